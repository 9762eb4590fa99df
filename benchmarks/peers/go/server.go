// Go, one goroutine per connection: a sleep parks the goroutine; open(2) and pread(2) block the native thread that runs
// it, and the scheduler carries on with another, a new one if need be (beyond 10,000 of them the runtime ends all).
package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	longestLine  = 4096
	longestHead  = 65536
	longestMS    = 3_600_000
	longestWait  = 4 * time.Second
	idleTimeout  = 60 * time.Second
	drainTimeout = time.Second
	block        = 16 * 1024 // it is zeroed, and so costs each read that much memory
)

// How a request ends. The reply to one that is done has the status that the client asked for.
const (
	done         = ""
	queueTimeout = "1"
	badInput     = "2"
	noFile       = "5"
	ioError      = "6"
)

var (
	integer     = regexp.MustCompile(`^[ \t]*([+-]?[0-9]{1,18})[ \t]*$`)
	requestLine = regexp.MustCompile(`^([A-Z]+) (\S+) HTTP/1\.([01])$`)
	httpStatus  = map[string]int{done: 200, queueTimeout: 408, badInput: 400, noFile: 404, ioError: 500}
	reasons     = map[int]string{200: "OK", 400: "Bad Request", 404: "Not Found", 408: "Request Timeout",
		500: "Internal Server Error"}
)

// root is where files are read; empty: sleep only.
var root string

type request struct {
	status string
	sleep  time.Duration
	path   string
}

// parse takes RC,MS,PATH without its line end apart; false when it is bad input.
func parse(text string) (request, bool) {
	fields := strings.Split(text, ",")
	if len(fields) != 3 || fields[2] == "" {
		return request{}, false
	}
	status, ms := integer.FindStringSubmatch(fields[0]), integer.FindStringSubmatch(fields[1])
	if status == nil || ms == nil {
		return request{}, false
	}
	count, err := strconv.ParseInt(ms[1], 10, 64)
	if err != nil || count < 0 || count > longestMS {
		return request{}, false
	}
	return request{status[1], time.Duration(count) * time.Millisecond, fields[2]}, true
}

// readFile reads a file below root to its end and throws the data away.
func readFile(path string) error {
	if strings.HasPrefix(path, "/") || strings.ContainsRune(path, 0) {
		return fs.ErrNotExist
	}
	for _, part := range strings.Split(path, "/") {
		if part == ".." {
			return fs.ErrNotExist
		}
	}
	file, err := os.Open(root + string(filepath.Separator) + path)
	if err != nil {
		return err
	}
	defer file.Close()
	data := make([]byte, block)
	for offset := int64(0); ; {
		count, err := file.ReadAt(data, offset)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		offset += int64(count)
	}
}

// perform is the blocking read: everything in it waits in the goroutine that calls it. It returns how the request
// ends, and how long it took from the time since which it waits.
func perform(wanted request, since time.Time) (string, time.Duration) {
	if time.Since(since) >= longestWait {
		return queueTimeout, time.Since(since)
	}
	time.Sleep(wanted.sleep)
	status := done
	if root != "" {
		switch err := readFile(wanted.path); {
		case err == nil:
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOTDIR),
			errors.Is(err, syscall.EISDIR):
			status = noFile
		default:
			status = ioError
		}
	}
	return status, time.Since(since)
}

// client is a connection whose every call waits for a limited time.
type client struct{ *net.TCPConn }

func (c client) Read(data []byte) (int, error) {
	c.SetReadDeadline(time.Now().Add(idleTimeout))
	return c.TCPConn.Read(data)
}

func (c client) Write(data []byte) (int, error) {
	c.SetWriteDeadline(time.Now().Add(idleTimeout))
	return c.TCPConn.Write(data)
}

// drain says that the reply is over, and throws away what still comes: to close with bytes unread would reset the
// connection, and the reset may overtake the reply.
func (c client) drain() {
	c.CloseWrite()
	data := make([]byte, 4096)
	c.SetReadDeadline(time.Now().Add(drainTimeout))
	for {
		if _, err := c.TCPConn.Read(data); err != nil {
			return
		}
	}
}

// converse has one connection, from its first byte to its end.
func converse(c client, accepted time.Time) {
	defer c.Close()
	input := bufio.NewReaderSize(c, longestLine)
	// ReadSlice ends at the newline, at the end of the input, or when the buffer is full: then the line is too long.
	line, err := input.ReadSlice('\n')
	if len(line) == 0 || err != nil && err != io.EOF && err != bufio.ErrBufferFull {
		return
	}
	text := strings.TrimSuffix(string(line), "\n")
	text = strings.TrimSuffix(text, "\r")
	if err == nil && requestLine.MatchString(text) {
		converseHTTP(c, input, text, accepted)
		return
	}
	wanted, good := parse(text)
	if !good || err == bufio.ErrBufferFull {
		fmt.Fprintf(c, "%s,0,\n", badInput)
	} else {
		status, total := perform(wanted, accepted)
		if status == done {
			status = wanted.status
		}
		fmt.Fprintf(c, "%s,%d,%s\n", status, total.Milliseconds(), wanted.path)
	}
	c.drain()
}

// converseHTTP answers requests until one is the last; line is the first one's.
func converseHTTP(c client, input *bufio.Reader, line string, since time.Time) {
	for {
		connection, err := connectionHeader(input)
		if err != nil {
			return
		}
		wanted, good, keepAlive := request{}, false, false
		if match := requestLine.FindStringSubmatch(line); match != nil && match[1] == "GET" {
			keepAlive = connection == "keep-alive" || match[3] == "1" && connection != "close"
			wanted, good = parseTarget(match[2])
		}
		status, total := badInput, time.Duration(0)
		if good {
			status, total = perform(wanted, since)
		}
		if err := answerHTTP(c, wanted, status, total, keepAlive); err != nil {
			return
		}
		if !keepAlive {
			c.drain()
			return
		}
		if _, err := input.Peek(1); err != nil {
			return
		}
		since = time.Now()
		if line, err = headLine(input); err != nil {
			return
		}
	}
}

// headLine returns a line of a head without its end.
func headLine(input *bufio.Reader) (string, error) {
	line, err := input.ReadSlice('\n') // in the buffer: a line that is longer is an error
	return string(bytes.TrimRight(line, "\r\n")), err
}

// connectionHeader reads a head to its end and returns what it says of the connection.
func connectionHeader(input *bufio.Reader) (string, error) {
	connection := ""
	for size := 0; size < longestHead; {
		line, err := headLine(input)
		if err != nil || line == "" {
			return connection, err
		}
		if name, value, found := strings.Cut(line, ":"); found && strings.EqualFold(name, "connection") {
			connection = strings.ToLower(strings.TrimSpace(value))
		}
		size += len(line) + 2
	}
	return "", bufio.ErrBufferFull
}

// parseTarget takes /RC,MS,PATH apart, percent-encoded.
func parseTarget(target string) (request, bool) {
	text, err := url.PathUnescape(strings.TrimPrefix(target, "/"))
	if err != nil || !strings.HasPrefix(target, "/") {
		return request{}, false
	}
	return parse(text)
}

func answerHTTP(c client, wanted request, status string, total time.Duration, keepAlive bool) error {
	code := httpStatus[status]
	body := reasons[code]
	if status == done {
		body = fmt.Sprintf("%d,%s", total.Milliseconds(), wanted.path)
	}
	connection := "close"
	if keepAlive {
		connection = "keep-alive"
	}
	_, err := fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s",
		code, reasons[code], len(body), connection, body)
	return err
}

func main() {
	port := flag.Int("port", 0, "listen on this `port` of 127.0.0.1")
	flag.StringVar(&root, "root", "", "after the sleep, read the file below this `directory`")
	flag.Parse()
	// Package net listens with a backlog of net.core.somaxconn and sets TCP_NODELAY; package os raises the limit of
	// open files to the hard one (Go 1.19).
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: *port})
	if err != nil {
		fmt.Fprintln(os.Stderr, "go:", err)
		os.Exit(1)
	}
	for {
		connection, err := listener.AcceptTCP()
		if err != nil { // out of descriptors: those that end free some
			fmt.Fprintln(os.Stderr, "go:", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		go converse(client{connection}, time.Now())
	}
}
