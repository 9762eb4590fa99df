/* C, one detached thread per connection: a blocking read waits in nanosleep(2), open(2) or pread(2) in the thread of
 * its connection, which the kernel sets aside; there are as many threads as connections, without a limit. */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum {
    LONGEST_LINE = 4096,     /* bytes, line end included */
    LONGEST_HEAD = 65536,    /* bytes of an HTTP request line and headers */
    BLOCK = 65536,           /* bytes of a read */
    LONGEST_MS = 3600000,
    LONGEST_WAIT_MS = 4000,  /* in the queue */
    IDLE_S = 60,             /* in which a client must say something */
    STACK = 256 * 1024,      /* of a thread: a block, a line and some room */
};

enum status { DONE = 0, QUEUE_TIMEOUT = 1, BAD_INPUT = 2, NO_FILE = 5, IO_ERROR = 6 };

struct client {
    int fd;
    double accepted; /* when, in ms */
};

struct request {
    char code[24]; /* the status that the client wants back, as it came */
    long ms;
    char path[LONGEST_LINE];
    size_t path_length; /* a path may contain any byte */
};

struct input { /* what a client has sent and nobody has used */
    char data[LONGEST_HEAD + 1]; /* and a NUL, where text is searched */
    size_t length;
};

static int root = -1; /* directory from which to read; -1: sleep only */

static double now_ms(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

/* Reads an integer of 1 to 18 digits between blanks; returns whether it is one, its text without them, its value. */
static bool parse_integer(const char *at, const char *end, char text[24], long *value) {
    while (at < end && (*at == ' ' || *at == '\t')) at++;
    while (at < end && (end[-1] == ' ' || end[-1] == '\t')) end--;
    const char *digit = at < end && (*at == '+' || *at == '-') ? at + 1 : at;
    if (end - digit < 1 || end - digit > 18) return false;
    *value = 0;
    for (const char *each = digit; each < end; each++) {
        if (*each < '0' || *each > '9') return false;
        *value = *value * 10 + (*each - '0');
    }
    if (*at == '-') *value = -*value;
    memcpy(text, at, end - at);
    text[end - at] = 0;
    return true;
}

/* RC,MS,PATH without its line end. */
static bool parse(const char *text, size_t length, struct request *request) {
    const char *end = text + length;
    const char *first = memchr(text, ',', length);
    const char *second = first ? memchr(first + 1, ',', end - first - 1) : NULL;
    if (!second || second + 1 == end || memchr(second + 1, ',', end - second - 1)) return false;
    char ms[24];
    long code;
    if (!parse_integer(text, first, request->code, &code) || !parse_integer(first + 1, second, ms, &request->ms))
        return false;
    request->path_length = end - second - 1;
    if (request->ms < 0 || request->ms > LONGEST_MS || request->path_length >= sizeof request->path) return false;
    memcpy(request->path, second + 1, request->path_length);
    request->path[request->path_length] = 0;
    return true;
}

static bool leaves_root(const char *path) {
    if (*path == '/') return true;
    for (const char *part = path; part; part = strchr(part, '/') ? strchr(part, '/') + 1 : NULL)
        if (!strncmp(part, "..", 2) && (part[2] == '/' || !part[2])) return true;
    return false;
}

static enum status read_file(const struct request *request) {
    if (strlen(request->path) != request->path_length || leaves_root(request->path)) return NO_FILE;
    int fd = openat(root, request->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        switch (errno) {
        case ENOENT: case ENOTDIR: case EACCES: case EPERM: return NO_FILE;
        default: return IO_ERROR;
        }
    }
    char block[BLOCK];
    off_t offset = 0;
    ssize_t count;
    while ((count = pread(fd, block, sizeof block, offset)) > 0 || (count < 0 && errno == EINTR))
        if (count > 0) offset += count;
    enum status status = count == 0 ? DONE : errno == EISDIR ? NO_FILE : IO_ERROR;
    close(fd);
    return status;
}

/* The blocking read. Waits in the kernel, in the thread that calls it. */
static enum status perform(const struct request *request, double since) {
    if (now_ms() - since >= LONGEST_WAIT_MS) return QUEUE_TIMEOUT;
    struct timespec left = {request->ms / 1000, request->ms % 1000 * 1000000};
    while (nanosleep(&left, &left) < 0 && errno == EINTR) {}
    return root < 0 ? DONE : read_file(request);
}

static bool send_all(int fd, const char *data, size_t length) {
    while (length) {
        ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) return false;
        data += sent;
        length -= sent;
    }
    return true;
}

/* Closing with bytes unread resets the connection, and the reset may overtake the reply: takes them in, for a while. */
static void drain(int fd) {
    struct timeval second = {1, 0};
    char block[BLOCK];
    shutdown(fd, SHUT_WR);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof second);
    for (int count = 0; count < 64 && recv(fd, block, sizeof block, 0) > 0; count++) {}
}

/* Receives some more; returns false at the end of the input, when it is too much, or when the client says nothing. */
static bool receive(int fd, struct input *input) {
    ssize_t count;
    while ((count = recv(fd, input->data + input->length, LONGEST_HEAD - input->length, 0)) < 0 && errno == EINTR) {}
    if (count <= 0) return false;
    input->length += count;
    return true;
}

static void use_up(struct input *input, size_t count) {
    memmove(input->data, input->data + count, input->length - count);
    input->length -= count;
}

static void answer_line(int fd, const char *line, size_t length, bool too_long, double since) {
    struct request request;
    char reply[LONGEST_LINE + 64];
    size_t size;
    if (too_long || !parse(line, length, &request)) {
        size = sprintf(reply, "%d,0,\n", BAD_INPUT);
    } else {
        enum status status = perform(&request, since);
        if (status != DONE) sprintf(request.code, "%d", status);
        size = sprintf(reply, "%s,%ld,", request.code, (long)(now_ms() - since));
        memcpy(reply + size, request.path, request.path_length);
        size += request.path_length;
        reply[size++] = '\n';
    }
    send_all(fd, reply, size);
}

/* Whether a line, without its end, is METHOD SP target SP HTTP/1.x. */
static bool is_http(const char *line, size_t length) {
    const char *end = line + length, *at = line;
    while (at < end && *at >= 'A' && *at <= 'Z') at++;
    if (at == line || at == end || *at != ' ' || length < 12 || end - at < 11) return false;
    const char *version = end - 9;
    return !memcmp(version, " HTTP/1.", 8) && (end[-1] == '0' || end[-1] == '1') &&
           version > at + 1 && !memchr(at + 1, ' ', version - at - 1);
}

static size_t unescape(const char *from, size_t length, char *to) {
    size_t size = 0;
    for (size_t i = 0; i < length; i++) {
        to[size] = from[i];
        if (from[i] == '%' && i + 2 < length && isxdigit((unsigned char)from[i + 1]) &&
            isxdigit((unsigned char)from[i + 2])) {
            to[size] = (char)strtol((char[]){from[i + 1], from[i + 2], 0}, NULL, 16);
            i += 2;
        }
        size++;
    }
    return size;
}

/* The end of a head that begins at data, or NULL; data[length] is NUL. */
static char *end_of_head(char *data, size_t length) {
    for (char *at = data; (at = memchr(at, '\n', data + length - at)); at++) {
        if (at[1] == '\n') return at + 2;
        if (at[1] == '\r' && at[2] == '\n') return at + 3;
    }
    return NULL;
}

/* Answers one request; returns whether the connection is kept. */
static bool answer_http(int fd, char *head, char *end, double since) {
    char *line_end = memchr(head, '\n', end - head);
    size_t length = line_end - head - (line_end > head && line_end[-1] == '\r');
    bool is_get = is_http(head, length) && !memcmp(head, "GET ", 4);
    bool keep = is_get && head[length - 1] != '0';
    for (char *header = line_end + 1; header < end; header = (char *)memchr(header, '\n', end - header) + 1) {
        if (strncasecmp(header, "connection:", 11)) continue;
        char *value = header + 11 + strspn(header + 11, " \t");
        if (!strncasecmp(value, "close", 5)) keep = false;
        if (!strncasecmp(value, "keep-alive", 10)) keep = is_get;
    }
    struct request request;
    enum status status = BAD_INPUT;
    char body[LONGEST_LINE + 64], target[LONGEST_LINE];
    size_t size = 0;
    if (is_get && head[4] == '/' && length - 14 < sizeof target &&
        parse(target, unescape(head + 5, length - 14, target), &request)) {
        status = perform(&request, since);
        size = sprintf(body, "%ld,", (long)(now_ms() - since));
        memcpy(body + size, request.path, request.path_length);
        size += request.path_length;
    }
    const char *reason = status == DONE ? "200 OK" : status == QUEUE_TIMEOUT ? "408 Request Timeout" :
                         status == BAD_INPUT ? "400 Bad Request" : status == NO_FILE ? "404 Not Found" :
                         "500 Internal Server Error";
    if (status != DONE) size = sprintf(body, "%s", reason + 4);
    char reply[sizeof body + 256];
    size_t start = sprintf(reply, "HTTP/1.1 %s\r\nContent-Length: %zu\r\nConnection: %s\r\n\r\n", reason, size,
                           keep ? "keep-alive" : "close");
    memcpy(reply + start, body, size);
    return send_all(fd, reply, start + size) && keep;
}

static void converse_http(int fd, struct input *input, double since) {
    for (;;) {
        char *end;
        while (input->data[input->length] = 0, !(end = end_of_head(input->data, input->length)))
            if (!receive(fd, input)) return;
        bool keep = answer_http(fd, input->data, end, since);
        use_up(input, end - input->data);
        if (!keep) {
            drain(fd);
            return;
        }
        if (!input->length && !receive(fd, input)) return;
        since = now_ms();
    }
}

static void *converse(void *argument) {
    struct client client = *(struct client *)argument;
    free(argument);
    struct timeval idle = {IDLE_S, 0};
    setsockopt(client.fd, SOL_SOCKET, SO_RCVTIMEO, &idle, sizeof idle);
    setsockopt(client.fd, SOL_SOCKET, SO_SNDTIMEO, &idle, sizeof idle);
    setsockopt(client.fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    struct input input;
    input.length = 0;
    char *newline = NULL;
    while (!newline && input.length <= LONGEST_LINE && receive(client.fd, &input))
        newline = memchr(input.data, '\n', input.length);
    if (input.length) {
        size_t length = newline ? (size_t)(newline - input.data) : input.length;
        bool too_long = length + (newline != NULL) > LONGEST_LINE;
        if (newline && length && newline[-1] == '\r') length--;
        if (!too_long && newline && is_http(input.data, length)) {
            converse_http(client.fd, &input, client.accepted);
        } else {
            answer_line(client.fd, input.data, length, too_long, client.accepted);
            drain(client.fd);
        }
    }
    close(client.fd);
    return NULL;
}

static int listen_on(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    /* The kernel caps the backlog at net.core.somaxconn: listen(2). */
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 65535) < 0) {
        perror("server: listen");
        exit(1);
    }
    return fd;
}

int main(int argc, char **argv) {
    int port = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--port")) port = atoi(argv[i + 1]);
        if (!strcmp(argv[i], "--root") && (root = open(argv[i + 1], O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0) {
            perror("server: --root");
            return 1;
        }
    }
    if (!port) {
        fputs("usage: server --port N [--root DIR]\n", stderr);
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK);
    int listener = listen_on(port);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) { /* out of descriptors: those that end free some. The others are the client's affair. */
            if (errno == EMFILE || errno == ENFILE) perror("server: accept"), usleep(100000);
            continue;
        }
        struct client *client = malloc(sizeof *client);
        pthread_t thread;
        int error = ENOMEM;
        if (client) {
            *client = (struct client){fd, now_ms()};
            error = pthread_create(&thread, &attributes, converse, client);
        }
        if (error) {
            fprintf(stderr, "server: thread: %s\n", strerror(error));
            free(client);
            close(fd);
        }
    }
}
