// C# on Mono, one thread per connection, not of the thread pool, which adds but a thread or two per second: a blocking
// read waits in the thread of its connection; there are as many threads as connections, without a limit.

using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading;

/// <summary>The wire's constants.</summary>
static class Wire
{
    public const int LongestLine = 4096;
    public const int LongestHead = 65536;
    public const long LongestMs = 3600000;
    public const long LongestWaitMs = 4000;
    public const int IdleTimeoutMs = 60000;
    public const int DrainMs = 1000;
    public const int Block = 65536;

    public const string QueueTimeout = "1", BadInput = "2", NoFile = "5", IOError = "6";

    /// <summary>A character for each byte, so that paths come back as they went.</summary>
    public static readonly Encoding Bytes = Encoding.GetEncoding("iso-8859-1");

    public static long Now()
    {
        return Stopwatch.GetTimestamp();
    }

    public static long MillisecondsSince(long since)
    {
        return (Now() - since) / (Stopwatch.Frequency / 1000);
    }
}

/// <summary>One RC,MS,PATH.</summary>
sealed class Request
{
    static readonly Regex Number = new Regex(@"\A[ \t]*([+-]?[0-9]{1,18})[ \t]*\z", RegexOptions.Compiled);
    static readonly Regex Escape = new Regex("%([0-9A-Fa-f]{2})");

    public readonly string Status, Path;
    public readonly int Milliseconds;

    Request(string status, int milliseconds, string path)
    {
        Status = status;
        Milliseconds = milliseconds;
        Path = path;
    }

    /// <summary>Null when it is bad input.</summary>
    public static Request Parse(string text)
    {
        string[] fields = text.Split(',');
        if (fields.Length != 3 || fields[2].Length == 0)
            return null;
        Match status = Number.Match(fields[0]), milliseconds = Number.Match(fields[1]);
        if (!status.Success || !milliseconds.Success)
            return null;
        long wanted = long.Parse(milliseconds.Groups[1].Value);
        return wanted < 0 || wanted > Wire.LongestMs
            ? null
            : new Request(status.Groups[1].Value, (int)wanted, fields[2]);
    }

    /// <summary>The same of an HTTP target, /RC,MS,PATH percent-encoded.</summary>
    public static Request ParseTarget(string target)
    {
        if (target[0] != '/')
            return null;
        return Parse(Escape.Replace(target.Substring(1), escape =>
            ((char)Convert.ToInt32(escape.Groups[1].Value, 16)).ToString()));
    }
}

/// <summary>What came of a request, and how long that took since it began to wait.</summary>
struct Outcome
{
    public string Status;
    public long Milliseconds;
}

/// <summary>The blocking read, in whatever thread calls it.</summary>
/// <remarks>
/// Mono's garbage collector stops every thread with a signal and waits until each has taken it; a thread in a read of a
/// hung disk takes none, so from the next collection on everything waits for that disk. MONO_THREADS_SUSPEND=coop, which
/// is not the default, counts a thread in a system call as stopped.
/// </remarks>
sealed class Reader
{
    readonly string root;

    /// <param name="root">The directory of the files; null: requests only sleep.</param>
    public Reader(string root)
    {
        this.root = root;
    }

    /// <summary>Carry a request out, unless it has waited too long; bad input (null) is answered at once.</summary>
    public Outcome Perform(Request request, long since)
    {
        if (request == null)
            return new Outcome { Status = Wire.BadInput };
        string status = Wire.MillisecondsSince(since) < Wire.LongestWaitMs ? Read(request) : Wire.QueueTimeout;
        return new Outcome { Status = status, Milliseconds = Wire.MillisecondsSince(since) };
    }

    string Read(Request request)
    {
        Thread.Sleep(request.Milliseconds);
        if (root == null)
            return request.Status;
        if (request.Path.StartsWith("/", StringComparison.Ordinal) || request.Path.Split('/').Contains(".."))
            return Wire.NoFile;
        // Mono opens names that are UTF-8: another one is a file that is not there.
        string name = Encoding.UTF8.GetString(Wire.Bytes.GetBytes(request.Path));
        try
        {
            using (var file = new FileStream(root + "/" + name, FileMode.Open, FileAccess.Read, FileShare.ReadWrite, 1))
            {
                var block = new byte[Wire.Block];
                while (file.Read(block, 0, block.Length) > 0) { }
            }
        }
        catch (Exception error) when (error is FileNotFoundException || error is DirectoryNotFoundException
            || error is UnauthorizedAccessException || error is ArgumentException)
        {
            return Wire.NoFile;
        }
        catch (IOException)
        {
            return Wire.IOError;
        }
        return request.Status;
    }
}

/// <summary>One connection, from its first byte to its end.</summary>
sealed class Conversation
{
    static readonly Regex RequestLine = new Regex(@"\A([A-Z]+) ([^ \t-\r]+) HTTP/1\.([01])\z", RegexOptions.Compiled);
    static readonly Regex HeadEnd = new Regex(@"\r\n\r\n|\n\n");
    static readonly Dictionary<int, string> Reasons = new Dictionary<int, string> {
        { 200, "OK" }, { 400, "Bad Request" }, { 404, "Not Found" }, { 408, "Request Timeout" },
        { 500, "Internal Server Error" },
    };

    readonly Socket socket;
    readonly long accepted = Wire.Now(); // its first request waits from now on
    readonly Reader reader;
    readonly byte[] block = new byte[2 * Wire.LongestLine];
    string received = "";

    public Conversation(Socket socket, Reader reader)
    {
        this.socket = socket;
        this.reader = reader;
    }

    public void Run()
    {
        try
        {
            socket.NoDelay = true;
            socket.ReceiveTimeout = socket.SendTimeout = Wire.IdleTimeoutMs;
            while (received.IndexOf('\n') < 0 && received.Length <= Wire.LongestLine && Receive()) { }
            string line = received.Split('\n')[0];
            if (line.EndsWith("\r", StringComparison.Ordinal))
                line = line.Substring(0, line.Length - 1);
            if (RequestLine.IsMatch(line))
            {
                ConverseHttp();
            }
            else if (received.Length > 0)
            {
                Request request = line.Length < Wire.LongestLine ? Request.Parse(line) : null;
                Outcome outcome = reader.Perform(request, accepted);
                Send(outcome.Status + "," + outcome.Milliseconds + "," + (request == null ? "" : request.Path) + "\n");
                Drain();
            }
        }
        catch (SocketException)
        {
            // the client has gone, or says nothing
        }
        finally
        {
            socket.Close();
        }
    }

    void ConverseHttp()
    {
        long since = accepted;
        while (true)
        {
            Match end;
            while (!(end = HeadEnd.Match(received)).Success)
                if (received.Length >= Wire.LongestHead || !Receive())
                    return;
            string[] lines = received.Substring(0, end.Index).Split('\n');
            received = received.Substring(end.Index + end.Length);

            Match line = RequestLine.Match(lines[0].TrimEnd('\r'));
            bool understood = line.Success && line.Groups[1].Value == "GET";
            Request request = understood ? Request.ParseTarget(line.Groups[2].Value) : null;
            bool keepAlive = understood && StaysOpen(line.Groups[3].Value == "1", lines);

            Send(HttpReply(request, reader.Perform(request, since), keepAlive));
            if (!keepAlive)
            {
                Drain();
                return;
            }
            if (received.Length == 0 && !Receive())
                return;
            since = Wire.Now();
        }
    }

    static bool StaysOpen(bool byDefault, string[] lines)
    {
        const string name = "connection:";
        string header = lines.LastOrDefault(line => line.StartsWith(name, StringComparison.OrdinalIgnoreCase));
        string wanted = header == null ? "" : header.Substring(name.Length).Trim().ToLowerInvariant();
        return wanted == "keep-alive" || (byDefault && wanted != "close");
    }

    static string HttpReply(Request request, Outcome outcome, bool keepAlive)
    {
        int code = 200;
        string body;
        if (request != null && outcome.Status == request.Status)
        {
            body = outcome.Milliseconds + "," + request.Path;
        }
        else
        {
            switch (outcome.Status)
            {
                case Wire.QueueTimeout: code = 408; break;
                case Wire.BadInput: code = 400; break;
                case Wire.NoFile: code = 404; break;
                default: code = 500; break;
            }
            body = Reasons[code];
        }
        return "HTTP/1.1 " + code + " " + Reasons[code] + "\r\nContent-Length: " + body.Length
            + "\r\nConnection: " + (keepAlive ? "keep-alive" : "close") + "\r\n\r\n" + body;
    }

    /// <summary>Wait for more bytes; false at the end of input.</summary>
    bool Receive()
    {
        int count = socket.Receive(block);
        received += Wire.Bytes.GetString(block, 0, count);
        return count > 0;
    }

    void Send(string reply)
    {
        byte[] bytes = Wire.Bytes.GetBytes(reply);
        for (int sent = 0; sent < bytes.Length; )
            sent += socket.Send(bytes, sent, bytes.Length - sent, SocketFlags.None);
    }

    /// <summary>To close with bytes unread would reset the connection, and the reset may overtake the reply.</summary>
    void Drain()
    {
        socket.Shutdown(SocketShutdown.Send);
        socket.ReceiveTimeout = Wire.DrainMs;
        long begin = Wire.Now();
        while (Wire.MillisecondsSince(begin) < Wire.DrainMs && socket.Receive(block) > 0) { }
    }
}

static class Server
{
    const int StackBytes = 256 * 1024;

    static void Main(string[] arguments)
    {
        int port = 0;
        string root = null;
        for (int i = 0; i + 1 < arguments.Length; i += 2)
        {
            switch (arguments[i])
            {
                case "--port": port = int.Parse(arguments[i + 1]); break;
                case "--root": root = arguments[i + 1]; break;
                default: throw new ArgumentException(arguments[i]);
            }
        }
        var reader = new Reader(root);
        var listener = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
        listener.SetSocketOption(SocketOptionLevel.Socket, SocketOptionName.ReuseAddress, true);
        listener.Bind(new IPEndPoint(IPAddress.Loopback, port));
        // the longest backlog that the system allows
        listener.Listen(int.Parse(File.ReadAllText("/proc/sys/net/core/somaxconn")));
        while (true)
        {
            Socket socket = null;
            try
            {
                socket = listener.Accept();
                new Thread(new Conversation(socket, reader).Run, StackBytes) { IsBackground = true }.Start();
            }
            catch (Exception error) when (error is SocketException || error is OutOfMemoryException)
            {
                // out of descriptors or threads: those that end free some
                Console.Error.WriteLine("csharp: " + error.Message);
                if (socket != null)
                    socket.Close();
                Thread.Sleep(100);
            }
        }
    }
}
