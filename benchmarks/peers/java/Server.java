// Java, one thread per connection, of a cached pool without a limit (Executors.newCachedThreadPool): a blocking read
// waits in the thread of its connection; a thread that has had nothing to do for 60 s ends.

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStream;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.AccessDeniedException;
import java.nio.file.FileSystemException;
import java.nio.file.Files;
import java.nio.file.InvalidPathException;
import java.nio.file.NoSuchFileException;
import java.nio.file.NotDirectoryException;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Text is ISO 8859-1 everywhere: a character for each byte, so that paths come back as they went. */
public final class Server {
    private static final int LONGEST_LINE = 4096;
    private static final int LONGEST_HEAD = 65_536;
    private static final long LONGEST_MS = 3_600_000;
    private static final long LONGEST_WAIT_MS = 4_000;
    private static final int IDLE_TIMEOUT_MS = 60_000;
    private static final int DRAIN_MS = 1_000;
    private static final int BLOCK = 65_536;

    private static final String QUEUE_TIMEOUT = "1";
    private static final String BAD_INPUT = "2";
    private static final String NO_FILE = "5";
    private static final String IO_ERROR = "6";
    private static final Map<Integer, String> REASONS = Map.of(
            200, "OK", 400, "Bad Request", 404, "Not Found", 408, "Request Timeout", 500, "Internal Server Error");

    private static final Pattern INTEGER = Pattern.compile("[ \t]*([+-]?[0-9]{1,18})[ \t]*");
    private static final Pattern REQUEST_LINE = Pattern.compile("([A-Z]+) (\\S+) HTTP/1\\.([01])");
    private static final Pattern CONNECTION = Pattern.compile("(?m)^connection:(.*)$");
    private static final Pattern ESCAPE = Pattern.compile("%([0-9A-Fa-f]{2})");

    /** One {@code RC,MS,PATH}. */
    private record Request(String status, long milliseconds, String path) {
        /** Null when it is bad input. */
        static Request parse(String text) {
            String[] fields = text.split(",", -1);
            if (fields.length != 3 || fields[2].isEmpty()) {
                return null;
            }
            Matcher status = INTEGER.matcher(fields[0]);
            Matcher milliseconds = INTEGER.matcher(fields[1]);
            if (!status.matches() || !milliseconds.matches()) {
                return null;
            }
            long wanted = Long.parseLong(milliseconds.group(1));
            return wanted < 0 || wanted > LONGEST_MS ? null : new Request(status.group(1), wanted, fields[2]);
        }

        /** The same of an HTTP target, {@code /RC,MS,PATH} percent-encoded. */
        static Request parseTarget(String target) {
            if (!target.startsWith("/")) {
                return null;
            }
            return parse(ESCAPE.matcher(target.substring(1)).replaceAll(escape ->
                    Matcher.quoteReplacement(Character.toString(Integer.parseInt(escape.group(1), 16)))));
        }
    }

    /** What came of a request, and how long that took since it began to wait. */
    private record Outcome(String status, long milliseconds) {}

    /** Below it are the files that are read; null: requests only sleep. */
    private final Path root;

    private Server(Path root) {
        this.root = root;
    }

    /** Carry a request out in this thread, unless it has waited too long; bad input (null) is answered at once. */
    private Outcome perform(Request request, long since) throws InterruptedException {
        if (request == null) {
            return new Outcome(BAD_INPUT, 0);
        }
        String status = millisecondsSince(since) < LONGEST_WAIT_MS ? read(request) : QUEUE_TIMEOUT;
        return new Outcome(status, millisecondsSince(since));
    }

    /** Sleep, then read the file to its end. */
    private String read(Request request) throws InterruptedException {
        Thread.sleep(request.milliseconds);
        if (root == null) {
            return request.status;
        }
        if (request.path.startsWith("/") || Arrays.asList(request.path.split("/", -1)).contains("..")) {
            return NO_FILE;
        }
        // Java opens names that are text of the locale's encoding: one that is not UTF-8 is a file that is not there.
        String name = new String(request.path.getBytes(ISO_8859_1), UTF_8);
        try (FileChannel channel = FileChannel.open(root.resolve(name))) {
            ByteBuffer block = ByteBuffer.allocate(BLOCK);
            long offset = 0;
            for (int count; (count = channel.read(block.clear(), offset)) > 0; ) {
                offset += count;
            }
        } catch (NoSuchFileException | AccessDeniedException | InvalidPathException error) {
            return NO_FILE;
        } catch (FileSystemException error) {
            return "Not a directory".equals(error.getReason()) ? NO_FILE : IO_ERROR;
        } catch (IOException error) { // open(2) takes a directory; it is pread(2) that does not
            return "Is a directory".equals(error.getMessage()) ? NO_FILE : IO_ERROR;
        }
        return request.status;
    }

    private static long millisecondsSince(long nanoTime) {
        return (System.nanoTime() - nanoTime) / 1_000_000;
    }

    /** One connection, from its first byte to its end. */
    private final class Conversation implements Runnable {
        private final Socket socket;
        private final long accepted = System.nanoTime(); // its first request waits from now on
        private byte[] received = new byte[2 * LONGEST_LINE];
        private int length;
        private InputStream input;

        Conversation(Socket socket) {
            this.socket = socket;
        }

        @Override
        public void run() {
            try (socket) {
                socket.setTcpNoDelay(true);
                socket.setSoTimeout(IDLE_TIMEOUT_MS);
                input = socket.getInputStream();
                int end;
                while ((end = find("\n")) < 0 && length <= LONGEST_LINE && receive()) {}
                String line = text(end < 0 ? length : end);
                if (line.endsWith("\r")) {
                    line = line.substring(0, line.length() - 1);
                }
                if (REQUEST_LINE.matcher(line).matches()) {
                    converseHttp();
                } else if (length > 0) {
                    Request request = line.length() < LONGEST_LINE ? Request.parse(line) : null;
                    Outcome outcome = perform(request, accepted);
                    String path = request == null ? "" : request.path;
                    send(outcome.status + "," + outcome.milliseconds + "," + path + "\n");
                    drain();
                }
            } catch (IOException error) {
                // the client has gone, or says nothing
            } catch (InterruptedException error) {
                throw new AssertionError("nobody interrupts", error);
            }
        }

        private void converseHttp() throws IOException, InterruptedException {
            long since = accepted;
            while (true) {
                int end;
                int mark;
                while ((end = find("\r\n\r\n")) < 0 & (mark = find("\n\n")) < 0) {
                    if (length >= LONGEST_HEAD || !receive()) {
                        return;
                    }
                }
                boolean bare = end < 0;
                String head = text(bare ? mark : end);
                discard(bare ? mark + 2 : end + 4);

                String[] lines = head.split("\r?\n", 2);
                Matcher requestLine = REQUEST_LINE.matcher(lines[0]);
                boolean understood = requestLine.matches() && requestLine.group(1).equals("GET");
                Request request = understood ? Request.parseTarget(requestLine.group(2)) : null;
                boolean keepAlive = understood
                        && staysOpen(requestLine.group(3), lines.length > 1 ? lines[1] : "");

                Outcome outcome = perform(request, since);
                send(httpReply(request, outcome, keepAlive));
                if (!keepAlive) {
                    drain();
                    return;
                }
                if (length == 0 && !receive()) {
                    return;
                }
                since = System.nanoTime();
            }
        }

        private boolean staysOpen(String minorVersion, String headers) {
            String connection = "";
            Matcher header = CONNECTION.matcher(headers.toLowerCase(Locale.ROOT));
            while (header.find()) {
                connection = header.group(1).strip();
            }
            return connection.equals("keep-alive") || (minorVersion.equals("1") && !connection.equals("close"));
        }

        private String httpReply(Request request, Outcome outcome, boolean keepAlive) {
            int code = 200;
            String body;
            if (request != null && outcome.status.equals(request.status)) {
                body = outcome.milliseconds + "," + request.path;
            } else {
                code = switch (outcome.status) {
                    case QUEUE_TIMEOUT -> 408;
                    case BAD_INPUT -> 400;
                    case NO_FILE -> 404;
                    default -> 500;
                };
                body = REASONS.get(code);
            }
            return "HTTP/1.1 " + code + " " + REASONS.get(code) + "\r\nContent-Length: " + body.length()
                    + "\r\nConnection: " + (keepAlive ? "keep-alive" : "close") + "\r\n\r\n" + body;
        }

        /** Wait for more bytes; false at the end of input. */
        private boolean receive() throws IOException {
            if (length == received.length) {
                received = Arrays.copyOf(received, 2 * length);
            }
            int count = input.read(received, length, received.length - length);
            length += Math.max(count, 0);
            return count > 0;
        }

        private int find(String mark) {
            return text(length).indexOf(mark);
        }

        private String text(int end) {
            return new String(received, 0, end, ISO_8859_1);
        }

        private void discard(int count) {
            System.arraycopy(received, count, received, 0, length - count);
            length -= count;
        }

        private void send(String reply) throws IOException {
            socket.getOutputStream().write(reply.getBytes(ISO_8859_1));
        }

        /** To close with bytes unread would reset the connection, and the reset may overtake the reply. */
        private void drain() throws IOException {
            socket.shutdownOutput();
            socket.setSoTimeout(DRAIN_MS);
            long begin = System.nanoTime();
            while (millisecondsSince(begin) < DRAIN_MS && input.read(received) > 0) {}
        }
    }

    /** The longest that the system allows. */
    private static int backlog() throws IOException {
        // Not Files.readString: it asks a file of length 0 for one byte first, and a file of /proc/sys says its number
        // in one read only.
        try (BufferedReader file = Files.newBufferedReader(Path.of("/proc/sys/net/core/somaxconn"))) {
            return Integer.parseInt(file.readLine());
        }
    }

    public static void main(String[] arguments) throws IOException, InterruptedException {
        int port = 0;
        Path root = null;
        for (int i = 0; i + 1 < arguments.length; i += 2) {
            switch (arguments[i]) {
                case "--port" -> port = Integer.parseInt(arguments[i + 1]);
                case "--root" -> root = Path.of(arguments[i + 1]);
                default -> throw new IllegalArgumentException(arguments[i]);
            }
        }
        Server server = new Server(root);
        ExecutorService threads = Executors.newCachedThreadPool();
        try (ServerSocket listener = new ServerSocket(port, backlog(), InetAddress.getByName("127.0.0.1"))) {
            while (true) {
                Socket socket = null;
                try {
                    socket = listener.accept();
                    threads.execute(server.new Conversation(socket));
                } catch (IOException | OutOfMemoryError error) {
                    // out of descriptors or threads: those that end free some
                    System.err.println("java: " + error);
                    if (socket != null) {
                        socket.close();
                    }
                    Thread.sleep(100);
                }
            }
        }
    }
}
