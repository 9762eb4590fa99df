/* D, one thread of druntime (core.thread) per connection: a blocking read waits in its connection's thread; no limit to
 * them. The garbage collector stops them all to collect, and waits for those in a read that no signal interrupts. */
module server;

import core.stdc.errno;
import core.sync.mutex : Mutex;
import core.sys.posix.fcntl : O_RDONLY, open;
import core.sys.posix.sys.resource : getrlimit, rlimit, RLIMIT_NOFILE, setrlimit;
import core.sys.posix.unistd : close, pread;
import core.thread : Thread;
import core.time : Duration, MonoTime, msecs, seconds;
import std.algorithm;
import std.array : split;
import std.ascii : isDigit, isHexDigit, isUpper, toLower;
import std.conv : to;
import std.file : readText;
import std.format : format;
import std.getopt : getopt;
import std.range : enumerate, only;
import std.socket;
import std.stdio : stderr;
import std.string : chomp, representation, toStringz;

enum longestLine = 4096; // bytes, line end included
enum longestHead = 65_536;
enum longestMs = 3_600_000;
enum longestWait = 4.seconds;
enum idleTimeout = 60.seconds;
enum drainTimeout = 1.seconds;
enum block = 65_536;
enum stack = 256 * 1024;

/// How a request ends.
enum Status { done = 0, queueTimeout = 1, badInput = 2, noFile = 5, ioError = 6 }

/// One RC,MS,PATH. What comes from a client is bytes, and a slice of them is no valid string for sure.
struct Request
{
    const(ubyte)[] code; // the status that the client wants back, as it came
    Duration sleep;
    const(ubyte)[] path;
}

/// Where files are read; null: sleep only.
__gshared string root;

bool isBlank(ubyte c) { return c == ' ' || c == '\t'; }

/// Whether a text is a word, in small or capital letters.
bool says(const(ubyte)[] text, string word) { return text.map!toLower.equal(word.representation); }

/// An integer of 1 to 18 digits, with blanks around it; false when it is none.
bool parseInteger(const(ubyte)[] field, out const(ubyte)[] text, out long value)
{
    field = field.strip!isBlank;
    const digits = field.length && (field[0] == '+' || field[0] == '-') ? field[1 .. $] : field;
    if (!digits.length || digits.length > 18 || !digits.all!isDigit) return false;
    foreach (digit; digits) value = value * 10 + (digit - '0');
    if (field[0] == '-') value = -value;
    text = field;
    return true;
}

/// RC,MS,PATH without its line end; false when it is bad input.
bool parse(const(ubyte)[] line, out Request request)
{
    const first = line.countUntil(',');
    if (first < 0) return false;
    const second = line[first + 1 .. $].countUntil(',');
    if (second < 0) return false;
    const path = line[first + second + 2 .. $];
    const(ubyte)[] text;
    long code, ms;
    if (!path.length || path.canFind(',')) return false;
    if (!parseInteger(line[first + 1 .. first + 1 + second], text, ms) || ms < 0 || ms > longestMs) return false;
    if (!parseInteger(line[0 .. first], text, code)) return false;
    request = Request(text, ms.msecs, path);
    return true;
}

/// Reads a file to its end and throws the data away.
Status readFile(const(ubyte)[] path)
{
    if (path.startsWith('/') || path.canFind(0) || path.splitter('/').any!(part => part == "..".representation))
        return Status.noFile;
    const fd = open((root ~ '/' ~ cast(const(char)[]) path).toStringz, O_RDONLY);
    if (fd < 0)
        return only(ENOENT, ENOTDIR, EACCES, EPERM).canFind(errno) ? Status.noFile : Status.ioError;
    scope (exit) close(fd);
    ubyte[block] data = void;
    for (long offset = 0;;)
    {
        const count = pread(fd, data.ptr, data.length, offset);
        if (count == 0) return Status.done;
        if (count < 0 && errno != EINTR) return errno == EISDIR ? Status.noFile : Status.ioError;
        if (count > 0) offset += count;
    }
}

/// The blocking read: everything in it waits in the thread that calls it.
Status perform(in Request request, MonoTime since)
{
    if (MonoTime.currTime - since >= longestWait) return Status.queueTimeout;
    Thread.sleep(request.sleep);
    return root is null ? Status.done : readFile(request.path);
}

/// METHOD SP target SP HTTP/1.x.
struct RequestLine
{
    const(ubyte)[] method, target;
    bool oneDotOne;

    static bool parse(const(ubyte)[] line, out RequestLine result)
    {
        const words = line.split(ubyte(' '));
        if (words.length != 3 || !words[0].length || !words[0].all!isUpper || !words[1].length) return false;
        if (words[2] != "HTTP/1.0".representation && words[2] != "HTTP/1.1".representation) return false;
        result = RequestLine(words[0], words[1], words[2][$ - 1] == '1');
        return true;
    }
}

const(ubyte)[] unescape(const(ubyte)[] text)
{
    ubyte[] plain;
    plain.reserve(text.length);
    while (text.length)
    {
        const escaped = text[0] == '%' && text.length > 2 && isHexDigit(text[1]) && isHexDigit(text[2]);
        plain ~= text[0];
        if (escaped) plain[$ - 1] = (cast(const(char)[]) text[1 .. 3]).to!ubyte(16);
        text = text[escaped ? 3 : 1 .. $];
    }
    return plain;
}

/// Where the head ends that the input begins with; -1 when it is not all there.
ptrdiff_t endOfHead(const(ubyte)[] input)
{
    foreach (i, c; input)
    {
        if (c != '\n') continue;
        if (input[i + 1 .. $].startsWith('\n')) return i + 2;
        if (input[i + 1 .. $].startsWith("\r\n".representation)) return i + 3;
    }
    return -1;
}

/// One connection, from its first byte to its end, in its own thread. A disk that hangs stops all of them at the next
/// collection: it is the collector that waits. With --DRT-gcopt=gc:manual, which never collects, they carry on.
final class Conversation : Thread
{
    private Socket socket;
    private MonoTime since;
    private ubyte[] input; // what the client has sent and nobody has used

    private static shared Mutex guard;
    private static __gshared Conversation[] ended;

    shared static this() { guard = new shared Mutex; }

    this(Socket socket)
    {
        this.socket = socket;
        since = MonoTime.currTime;
        super(&run, stack);
    }

    /// Lets go of the threads that have ended: until they are joined, or collected, their stacks stay.
    static void joinEnded()
    {
        Conversation[] all;
        synchronized (guard)
        {
            all = ended;
            ended = null;
        }
        foreach (each; all) each.join(false);
    }

    private void run()
    {
        try
            converse();
        catch (Exception) {} // the client has gone, or says nothing
        socket.close();
        synchronized (guard) ended ~= this;
    }

    private void converse()
    {
        socket.setOption(SocketOptionLevel.TCP, SocketOption.TCP_NODELAY, true);
        socket.setOption(SocketOptionLevel.SOCKET, SocketOption.RCVTIMEO, idleTimeout);
        socket.setOption(SocketOptionLevel.SOCKET, SocketOption.SNDTIMEO, idleTimeout);
        ptrdiff_t newline;
        while ((newline = input.countUntil('\n')) < 0 && input.length <= longestLine && receive()) {}
        if (!input.length) return;
        const(ubyte)[] line = newline < 0 ? input : input[0 .. newline];
        const tooLong = line.length >= longestLine;
        if (line.endsWith('\r')) line = line[0 .. $ - 1];
        RequestLine http;
        if (newline >= 0 && !tooLong && RequestLine.parse(line, http))
        {
            while (answerHttp()) {}
            return;
        }
        Request request;
        if (tooLong || !parse(line, request))
            send(format!"%d,0,\n"(Status.badInput).representation);
        else
        {
            const status = perform(request, since);
            const code = status == Status.done ? cast(const(char)[]) request.code : status.to!int.to!string;
            send(format!"%s,%d,"(code, (MonoTime.currTime - since).total!"msecs").representation ~ request.path ~ '\n');
        }
        drain();
    }

    /// Answers one request; returns whether there is another one.
    private bool answerHttp()
    {
        ptrdiff_t end;
        while ((end = endOfHead(input)) < 0)
            if (input.length >= longestHead || !receive()) return false;
        RequestLine http;
        bool isGet, keepAlive;
        foreach (number, line; input[0 .. end].splitter('\n').enumerate)
        {
            line = line.stripRight('\r');
            if (number == 0)
            {
                isGet = RequestLine.parse(line, http) && http.method == "GET".representation;
                keepAlive = isGet && http.oneDotOne;
            }
            else if (line.length > 11 && line[0 .. 11].says("connection:"))
            {
                const value = line[11 .. $].strip!isBlank;
                if (value.says("close")) keepAlive = false;
                if (value.says("keep-alive")) keepAlive = isGet;
            }
        }
        Request request;
        auto status = Status.badInput;
        if (isGet && http.target[0] == '/' && parse(unescape(http.target[1 .. $]), request))
            status = perform(request, since);
        const total = (MonoTime.currTime - since).total!"msecs";
        const reason = reasonOf(status);
        const(ubyte)[] body = reason[4 .. $].representation;
        if (status == Status.done) body = format!"%d,"(total).representation ~ request.path;
        send(format!"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n"(
                reason, body.length, keepAlive ? "keep-alive" : "close").representation ~ body);
        if (!keepAlive)
        {
            drain();
            return false;
        }
        input = input[end .. $];
        if (!input.length && !receive()) return false;
        since = MonoTime.currTime;
        return true;
    }

    /// Receives some more; false at the end of the input, or when the client has gone or takes too long.
    private bool receive()
    {
        ubyte[longestLine] data = void;
        const count = again(() => socket.receive(data));
        if (count <= 0) return false;
        input ~= data[0 .. count];
        return true;
    }

    private void send(const(ubyte)[] data)
    {
        while (data.length)
        {
            const count = again(() => socket.send(data));
            if (count <= 0) throw new SocketOSException("send");
            data = data[count .. $];
        }
    }

    /// Says that the reply is over and throws away what still comes: closing with bytes unread would reset the
    /// connection, and the reset may overtake the reply.
    private void drain()
    {
        ubyte[block] data = void;
        socket.shutdown(SocketShutdown.SEND);
        socket.setOption(SocketOptionLevel.SOCKET, SocketOption.RCVTIMEO, drainTimeout);
        for (int i = 0; i < 64 && again(() => socket.receive(data)) > 0; i++) {}
    }
}

/// A call of a socket, anew when a signal has interrupted it: the collector stops the threads with signals, and calls
/// of sockets with a time-out are not restarted, SA_RESTART or not (signal(7)).
ptrdiff_t again(scope ptrdiff_t delegate() call)
{
    ptrdiff_t count;
    do
        count = call();
    while (count == Socket.ERROR && errno == EINTR);
    return count;
}

string reasonOf(Status status)
{
    final switch (status)
    {
        case Status.done: return "200 OK";
        case Status.queueTimeout: return "408 Request Timeout";
        case Status.badInput: return "400 Bad Request";
        case Status.noFile: return "404 Not Found";
        case Status.ioError: return "500 Internal Server Error";
    }
}

TcpSocket listen(ushort port)
{
    auto listener = new TcpSocket(AddressFamily.INET);
    listener.setOption(SocketOptionLevel.SOCKET, SocketOption.REUSEADDR, true);
    listener.bind(new InternetAddress("127.0.0.1", port));
    listener.listen(readText("/proc/sys/net/core/somaxconn").chomp.to!int);
    return listener;
}

int main(string[] words)
{
    ushort port;
    TcpSocket listener;
    try
    {
        getopt(words, "port", &port, "root", &root);
        listener = listen(port);
    }
    catch (Exception error)
    {
        stderr.writeln("usage: server --port N [--root DIR]: ", error.msg);
        return 1;
    }
    rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    for (;;)
    {
        Socket socket;
        try
        {
            socket = listener.accept();
            new Conversation(socket).start();
        }
        catch (Throwable error) // out of descriptors or threads: those that end free some
        {
            stderr.writeln("d: ", error.msg);
            if (socket) socket.close();
            Thread.sleep(100.msecs);
        }
        Conversation.joinEnded();
    }
}
