# Jython 2.7, one thread per connection: a thread of `threading` is one of the JVM, with no global lock, and a blocking
# read waits in the thread of its connection; there are as many threads as connections, without a limit.

# The sockets are Java's: those of Jython's own module cannot be shut down for writing alone (`shutdown(SHUT_WR)` sends
# nothing), and lose the reply to a client that has done so with its side.

# ruff: noqa - Python 2.7

from __future__ import print_function

import argparse
import errno
import re
import sys
import threading
import time
from collections import namedtuple

from jarray import zeros
from java.io import IOException
from java.lang import OutOfMemoryError, System
from java.net import InetAddress, ServerSocket

LONGEST_LINE = 4096
LONGEST_HEAD = 65536
LONGEST_MS = 3600000
LONGEST_WAIT = 4.0
IDLE_TIMEOUT_MS = 60000
DRAIN_MS = 1000
BLOCK = 65536

QUEUE_TIMEOUT, BAD_INPUT, NO_FILE, IO_ERROR = "1", "2", "5", "6"
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 408: "Request Timeout", 500: "Internal Server Error"}

INTEGER = re.compile(r"[ \t]*([+-]?[0-9]{1,18})[ \t]*\Z")
REQUEST_LINE = re.compile(r"([A-Z]+) (\S+) HTTP/1\.([01])\Z")
HEAD_END = re.compile(r"\r\n\r\n|\n\n")
CONNECTION = re.compile(r"^connection:([^\r\n]*)", re.MULTILINE | re.IGNORECASE)
ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")

Request = namedtuple("Request", "status milliseconds path")


def now():
    """Seconds of a clock that nobody sets: Python 2.7 has no time.monotonic."""
    return System.nanoTime() / 1e9


def parse(text):
    """`RC,MS,PATH` without its line end; None when it is bad input."""
    fields = text.split(",")
    if len(fields) != 3 or not fields[2]:
        return None
    status, milliseconds = INTEGER.match(fields[0]), INTEGER.match(fields[1])
    if status is None or milliseconds is None or not 0 <= int(milliseconds.group(1)) <= LONGEST_MS:
        return None
    return Request(status.group(1), int(milliseconds.group(1)), fields[2])


def parse_target(target):
    """The same of an HTTP target, `/RC,MS,PATH` percent-encoded."""
    if not target.startswith("/"):
        return None
    return parse(ESCAPE.sub(lambda escape: chr(int(escape.group(1), 16)), target[1:]))


def read(root, request):
    """Sleep, then read the file to its end; the status that comes of it."""
    time.sleep(request.milliseconds / 1000.0)
    if root is None:
        return request.status
    if request.path.startswith("/") or ".." in request.path.split("/") or "\0" in request.path:
        return NO_FILE
    # The JVM opens names that are text of the locale's encoding: one that is not UTF-8 is a file that is not there.
    name = root + "/" + request.path.decode("utf-8", "replace")
    try:
        with open(name, "rb", 0) as file:
            while file.read(BLOCK):
                pass
    except EnvironmentError as error:
        nowhere = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EISDIR)
        return NO_FILE if nowhere else IO_ERROR
    return request.status


class Conversation(object):
    """One connection, from its first byte to its end."""

    def __init__(self, sock, root):
        self.sock = sock
        self.root = root
        self.accepted = now()  # its first request waits from now on
        self.block = zeros(2 * LONGEST_LINE, "b")
        self.received = ""

    def run(self):
        try:
            self.sock.setTcpNoDelay(True)
            self.sock.setSoTimeout(IDLE_TIMEOUT_MS)
            while "\n" not in self.received and len(self.received) <= LONGEST_LINE and self.receive():
                pass
            line = self.received.split("\n", 1)[0]
            if line.endswith("\r"):
                line = line[:-1]
            if REQUEST_LINE.match(line):
                self.converse_http()
            elif self.received:
                request = parse(line) if len(line) < LONGEST_LINE else None
                status, milliseconds = self.perform(request, self.accepted)
                self.send("%s,%d,%s\n" % (status, milliseconds, request.path if request else ""))
                self.drain()
        except IOException:
            pass  # the client has gone, or says nothing
        finally:
            self.sock.close()

    def converse_http(self):
        since = self.accepted
        while True:
            end = HEAD_END.search(self.received)
            while end is None:
                if len(self.received) >= LONGEST_HEAD or not self.receive():
                    return
                end = HEAD_END.search(self.received)
            line, _, headers = self.received[: end.start()].partition("\n")
            self.received = self.received[end.end() :]

            match = REQUEST_LINE.match(line.rstrip("\r"))
            understood = match is not None and match.group(1) == "GET"
            request = parse_target(match.group(2)) if understood else None
            wanted = [each.strip().lower() for each in CONNECTION.findall(headers)][-1:]
            keep_alive = understood and (wanted == ["keep-alive"] or (match.group(3) == "1" and wanted != ["close"]))
            status, milliseconds = self.perform(request, since)
            self.send(http_reply(request, status, milliseconds, keep_alive))
            if not keep_alive:
                self.drain()
                return
            if not self.received and not self.receive():
                return
            since = now()

    def perform(self, request, since):
        """Carry it out here, unless it has waited too long; status and milliseconds since it began to wait."""
        if request is None:
            return BAD_INPUT, 0
        status = read(self.root, request) if now() - since < LONGEST_WAIT else QUEUE_TIMEOUT
        return status, int((now() - since) * 1000)

    def receive(self):
        """Wait for more bytes; false at the end of input."""
        count = self.sock.getInputStream().read(self.block)
        if count > 0:
            self.received += self.block[:count].tostring()
        return count > 0

    def send(self, reply):
        self.sock.getOutputStream().write(reply)

    def drain(self):
        """To close with bytes unread would reset the connection, and the reset may overtake the reply."""
        self.sock.shutdownOutput()
        self.sock.setSoTimeout(DRAIN_MS)
        ends = now() + DRAIN_MS / 1000.0
        while now() < ends and self.sock.getInputStream().read(self.block) > 0:
            pass


def http_reply(request, status, milliseconds, keep_alive):
    """The HTTP response that answers."""
    if request is not None and status == request.status:
        code, body = 200, "%d,%s" % (milliseconds, request.path)
    else:
        code = {QUEUE_TIMEOUT: 408, BAD_INPUT: 400, NO_FILE: 404}.get(status, 500)
        body = REASONS[code]
    return "HTTP/1.1 %d %s\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s" % (
        code, REASONS[code], len(body), "keep-alive" if keep_alive else "close", body,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--root")
    options = parser.parse_args()
    root = None if options.root is None else options.root.decode("utf-8")
    with open("/proc/sys/net/core/somaxconn") as file:
        backlog = int(file.read())  # the longest that the system allows
    listener = ServerSocket(options.port, backlog, InetAddress.getByName("127.0.0.1"))
    while True:
        sock = None
        try:
            sock = listener.accept()
            thread = threading.Thread(target=Conversation(sock, root).run)
            thread.daemon = True
            thread.start()
        except (IOException, OutOfMemoryError) as error:
            # out of descriptors or threads: those that end free some
            print("jython: %s" % error, file=sys.stderr)
            if sock is not None:
                sock.close()
            time.sleep(0.1)


main()
