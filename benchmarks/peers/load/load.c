/* Load for a server that speaks RC,MS,PATH, in one thread with epoll: fast enough not to be what is measured.
 *
 *   load PORT open TIMEOUT_MS < SCHEDULE        open-loop: each line "DUE_MS TAG RC,MS,PATH" leaves at its time on a
 *                                               connection of its own, whatever became of the ones before it
 *   load PORT line CLIENTS SECONDS RC,MS,PATH   closed-loop: so many clients, the line protocol, one after the other
 *   load PORT http CLIENTS SECONDS RC,MS,PATH   the same over HTTP/1.1, connections kept as long as the server does
 *
 * Standard output: a line per request, "TAG DUE_US END_US CONNECTED_US OUTCOME", times since the start, which the last
 * line gives on CLOCK_MONOTONIC: "start_us=... cpu_us=... connections=...". CONNECTED_US is -1 when it never was.
 * OUTCOME: ok, status-N (another status than the one asked for), wrong (no answer of this protocol, or not to this
 * request), closed (no answer), refused, timeout, local (out of descriptors or ports here). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { REPLY_MAX = 8192, TEXT_MAX = 256 };

struct request {
	int64_t due, end, connected;
	const char *outcome;
	int tag, code;
	char text[TEXT_MAX];	/* RC,MS,PATH */
	int fd;
	int sent, reused;
	size_t got;
	char *reply;
	struct request *next;	/* of those under way, in the order of their time-outs */
	struct request *previous;
};

static int port, epoll_fd, http;
static int64_t start, timeout_us = 60000000;
static long connections;
static struct request *oldest, *newest;
static long under_way;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int64_t clock_us(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static int64_t now(void)
{
	return clock_us(CLOCK_MONOTONIC) - start;
}

/* It is over; its socket stays as it is. */
static void note(struct request *r, const char *outcome)
{
	r->end = now();
	r->outcome = outcome;
	free(r->reply);
	r->reply = NULL;
	if (r->previous) r->previous->next = r->next; else oldest = r->next;
	if (r->next) r->next->previous = r->previous; else newest = r->previous;
	under_way--;
}

static void hang_up(struct request *r)
{
	if (r->fd >= 0) close(r->fd);
	r->fd = -1;
}

static void done(struct request *r, const char *outcome)
{
	note(r, outcome);
	hang_up(r);
}

static void enlist(struct request *r)
{
	r->previous = newest;
	r->next = NULL;
	if (newest) newest->next = r; else oldest = r;
	newest = r;
	under_way++;
	r->got = 0;
	r->sent = 0;
	r->outcome = NULL;
	r->connected = -1;
	if (!r->reply && !(r->reply = malloc(REPLY_MAX + 1))) die("malloc");
}

static void watch(struct request *r, uint32_t events, int operation)
{
	struct epoll_event event = { .events = events, .data.ptr = r };
	if (epoll_ctl(epoll_fd, operation, r->fd, &event) < 0) die("epoll_ctl");
}

static void begin(struct request *r)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int one = 1;
	enlist(r);
	r->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (r->fd < 0) {
		done(r, "local");
		return;
	}
	setsockopt(r->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	connections++;
	if (connect(r->fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS) {
		done(r, errno == EADDRNOTAVAIL ? "local" : "refused");
		return;
	}
	watch(r, EPOLLOUT, EPOLL_CTL_ADD);
}

static int transmit(struct request *r)	/* requests are short: they fit into the socket's buffer */
{
	char text[TEXT_MAX + 64];
	int size = http ? snprintf(text, sizeof text, "GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n", r->text)
			: snprintf(text, sizeof text, "%s\n", r->text);
	r->sent = 1;
	return send(r->fd, text, size, MSG_NOSIGNAL) == size;
}

static const char *status_name(int status)
{
	static char names[1000][16];
	if (status < 0 || status > 999) return "wrong";
	snprintf(names[status], sizeof names[status], "status-%d", status);
	return names[status];
}

/* "RC,TOTAL_MS,PATH" or "TOTAL_MS,PATH" that answers what was asked? */
static const char *judge(struct request *r, const char *body, int has_status)
{
	const char *path = strrchr(r->text, ',') + 1;
	char *end;
	if (has_status) {
		long status = strtol(body, &end, 10);
		if (end == body || *end != ',') return "wrong";
		if (status != atol(r->text)) return status_name(status);
		body = end + 1;
	}
	if (!isdigit((unsigned char)*body)) return "wrong";
	strtol(body, &end, 10);
	return *end == ',' && strcmp(end + 1, path) == 0 ? "ok" : "wrong";
}

/* The outcome when the reply is complete, NULL before. *keep says whether the connection can be used again. */
static const char *complete(struct request *r, int eof, int *keep)
{
	char *body, *length;
	size_t want;
	const char *outcome;
	*keep = 0;
	r->reply[r->got] = 0;
	if (!http) {
		char *end = memchr(r->reply, '\n', r->got);
		if (!end) return eof ? (r->got ? "wrong" : "closed") : r->got == REPLY_MAX ? "wrong" : NULL;
		*end = 0;
		return judge(r, r->reply, 1);
	}
	if (!(body = strstr(r->reply, "\r\n\r\n"))) return eof ? (r->got ? "wrong" : "closed") : r->got == REPLY_MAX ? "wrong" : NULL;
	body += 4;
	if (strncmp(r->reply, "HTTP/1.", 7)) return "wrong";
	length = strcasestr(r->reply, "\r\nContent-Length:");
	if (!length || length > body) return "wrong";
	want = strtoul(length + 17, NULL, 10);
	if (r->reply + r->got < body + want) return eof || r->got == REPLY_MAX ? "wrong" : NULL;
	body[want] = 0;
	outcome = atoi(r->reply + 9) == 200 ? judge(r, body, 0) : status_name(atoi(r->reply + 9));
	body[-2] = 0;
	*keep = !eof && !strcasestr(r->reply, "\r\nConnection: close");
	return outcome;
}

/* An event on a request's socket; the outcome when that ends it. The socket is left open when it can be kept. */
static const char *advance(struct request *r, int *keep)
{
	*keep = 0;
	if (!r->sent) {
		int error = 0;
		socklen_t size = sizeof error;
		getsockopt(r->fd, SOL_SOCKET, SO_ERROR, &error, &size);
		if (error) return "refused";
		r->connected = now();
		if (!transmit(r)) return "closed";
		watch(r, EPOLLIN, EPOLL_CTL_MOD);
		return NULL;
	}
	for (;;) {
		ssize_t n = recv(r->fd, r->reply + r->got, REPLY_MAX - r->got, 0);
		const char *outcome;
		if (n < 0) return errno == EAGAIN ? NULL : r->got ? "wrong" : "closed";
		r->got += n;
		if ((outcome = complete(r, n == 0, keep))) return outcome;
	}
}

static void print(const struct request *r)
{
	printf("%d %lld %lld %lld %s\n", r->tag, (long long)r->due, (long long)r->end, (long long)r->connected, r->outcome);
}

static void time_out(void)
{
	while (oldest && oldest->due + timeout_us <= now()) done(oldest, "timeout");
}

static void open_loop(void)
{
	size_t count = 0, room = 0, next = 0;
	struct request *all = NULL;
	struct epoll_event events[256];
	double due;
	int tag, timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	char text[TEXT_MAX];
	struct epoll_event tick = { .events = EPOLLIN, .data.ptr = NULL };
	if (timer < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer, &tick) < 0) die("timerfd");
	while (scanf("%lf %d %255[^\n]", &due, &tag, text) == 3) {
		if (count == room && !(all = realloc(all, (room = room ? 2 * room : 1024) * sizeof *all))) die("realloc");
		memset(&all[count], 0, sizeof *all);
		all[count].due = due * 1000;
		all[count].tag = tag;
		all[count].fd = -1;
		strcpy(all[count++].text, text);
	}
	start = clock_us(CLOCK_MONOTONIC) + 100000;	/* none is late because the first ones were being prepared */
	while (next < count || under_way) {
		int64_t wake = next < count ? all[next].due : INT64_MAX;
		if (oldest && oldest->due + timeout_us < wake) wake = oldest->due + timeout_us;
		struct itimerspec at = { .it_value = { (wake + start) / 1000000, (wake + start) % 1000000 * 1000 } };
		timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
		int n = epoll_wait(epoll_fd, events, 256, -1);
		for (int i = 0; i < n; i++) {
			struct request *r = events[i].data.ptr;
			const char *outcome;
			int keep;
			uint64_t ticks;
			if (!r) {
				if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN) die("timer");
			} else if (r->fd >= 0 && (outcome = advance(r, &keep))) {
				done(r, outcome);
			}
		}
		/* A few at a time: who answers meanwhile must not be noted late. */
		for (int batch = 0; batch < 32 && next < count && all[next].due <= now(); batch++) begin(&all[next++]);
		time_out();
	}
	for (size_t i = 0; i < count; i++) print(&all[i]);
}

/* The next request of a client, on a new connection. One that cannot even try has no more turns. */
static void turn(struct request *r)
{
	r->due = now();
	begin(r);
	if (r->outcome) print(r);
}

static void closed_loop(int clients, double seconds, const char *text)
{
	struct request *all = calloc(clients, sizeof *all);
	struct epoll_event events[256];
	int64_t ends = seconds * 1e6, patience = ends + 5000000;
	if (!all) die("calloc");
	start = clock_us(CLOCK_MONOTONIC);
	for (int i = 0; i < clients; i++) {
		snprintf(all[i].text, sizeof all[i].text, "%s", text);
		turn(&all[i]);
	}
	while (under_way && now() < patience) {
		int n = epoll_wait(epoll_fd, events, 256, 100);
		for (int i = 0; i < n; i++) {
			struct request *r = events[i].data.ptr;
			const char *outcome;
			int keep;
			if (r->fd < 0 || !(outcome = advance(r, &keep))) continue;
			note(r, outcome);
			/* A server may hang up on a connection that it kept just as the next request leaves: ask again. */
			if (!r->reused || strcmp(outcome, "closed")) print(r);
			if (!keep || r->end >= ends) hang_up(r);
			if (r->end >= ends || !strcmp(outcome, "refused")) continue;	/* nobody is there any more */
			r->reused = keep;
			if (!keep) {
				turn(r);
				continue;
			}
			r->due = now();
			enlist(r);
			r->connected = r->due;
			transmit(r);	/* should that fail, recv(2) will say so */
		}
	}
	while (oldest) {
		struct request *r = oldest;
		done(r, "timeout");
		print(r);
	}
}

int main(int argc, char **argv)
{
	struct rlimit files;
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	if ((epoll_fd = epoll_create1(0)) < 0) die("epoll_create1");
	port = argc > 1 ? atoi(argv[1]) : 0;
	if (argc == 4 && !strcmp(argv[2], "open")) {
		timeout_us = atoll(argv[3]) * 1000;
		open_loop();
	} else if (argc == 6 && (!strcmp(argv[2], "line") || !strcmp(argv[2], "http"))) {
		http = argv[2][0] == 'h';
		closed_loop(atoi(argv[3]), atof(argv[4]), argv[5]);
	} else {
		fprintf(stderr, "usage: load PORT open TIMEOUT_MS | load PORT line|http CLIENTS SECONDS RC,MS,PATH\n");
		return 2;
	}
	printf("start_us=%lld cpu_us=%lld connections=%ld\n", (long long)start, (long long)clock_us(CLOCK_PROCESS_CPUTIME_ID),
	       connections);
	return 0;
}
