## Nim, one native thread per connection, each with a heap of its own: a blocking read waits in the thread of its
## connection, which the kernel sets aside; there are as many threads as connections, without a limit.

import std/[monotimes, nativesockets, net, os, parseopt, posix, strutils, times]

const
  longestLine = 4096 # bytes, line end included
  longestHead = 65_536
  longestMs = 3_600_000
  longestWaitMs = 4_000
  idleSeconds = 60
  drainSeconds = 1
  blockSize = 65_536
  blanks = {' ', '\t'}

type
  Status = enum ## How a request ends.
    done = 0, queueTimeout = 1, badInput = 2, noFile = 5, ioError = 6

  Request = object
    code: string ## the status that the client wants back, as it came
    ms: int
    path: string

  Client = object
    socket: SocketHandle
    accepted: MonoTime
    thread: pointer ## its own, a ptr Thread[Client]

  Head = object
    isGet, keepAlive: bool
    target: string

var
  reads: bool             # whether there is a directory to read from; it is the working directory then
  ended: Channel[pointer] # the threads that can be joined

proc elapsedMs(since: MonoTime): int64 = inMilliseconds(getMonoTime() - since)

proc parseInteger(field: string, text: var string, value: var int): bool =
  ## An integer of 1 to 18 digits between blanks.
  text = field.strip(chars = blanks)
  let digits = if text.len > 0 and text[0] in {'+', '-'}: text[1 .. ^1] else: text
  if digits.len notin 1 .. 18 or not digits.allCharsInSet(Digits):
    return false
  value = parseInt(text)
  true

proc parse(line: string, request: var Request): bool =
  ## `RC,MS,PATH` without its line end; false when it is bad input.
  let fields = line.split(',')
  var
    code: int
    ms: string
  fields.len == 3 and fields[2].len > 0 and parseInteger(fields[0], request.code, code) and
    parseInteger(fields[1], ms, request.ms) and request.ms in 0 .. longestMs and
    (request.path = fields[2]; true)

proc readFileToItsEnd(path: string): Status =
  ## Throws the data away.
  if path.startsWith('/') or '\0' in path or ".." in path.split('/'):
    return noFile
  let fd = posix.open(path.cstring, O_RDONLY)
  if fd < 0:
    return if errno in [ENOENT, ENOTDIR, EACCES, EPERM]: noFile else: ioError
  var
    data {.noinit.}: array[blockSize, byte]
    offset = 0
  result = done
  while true:
    let count = pread(fd, addr data, data.len, offset)
    if count > 0:
      offset += count
    elif count == 0:
      break
    elif errno != EINTR:
      result = if errno == EISDIR: noFile else: ioError
      break
  discard posix.close(fd)

proc perform(request: Request, since: MonoTime): Status =
  ## The blocking read: everything in it waits in the thread that calls it.
  if elapsedMs(since) >= longestWaitMs:
    return queueTimeout
  sleep(request.ms)
  if reads: readFileToItsEnd(request.path) else: done

proc setTimeout(socket: SocketHandle, option: cint, seconds: int) =
  var time = Timeval(tv_sec: posix.Time(seconds))
  discard setsockopt(socket, SOL_SOCKET, option, addr time, sizeof(time).SockLen)

proc receive(socket: SocketHandle, input: var string): bool =
  ## Some more; false at the end of the input, or when the client has gone or takes too long.
  var data {.noinit.}: array[longestLine, char]
  var count = -1
  while true:
    count = recv(socket, addr data, data.len, 0)
    if count >= 0 or errno != EINTR:
      break
  if count <= 0:
    return false
  let length = input.len
  input.setLen(length + count)
  copyMem(addr input[length], addr data, count)
  true

proc send(socket: SocketHandle, data: string): bool =
  var sent = 0
  while sent < data.len:
    let count = send(socket, unsafeAddr data[sent], data.len - sent, MSG_NOSIGNAL)
    if count > 0:
      sent += count
    elif count == 0 or errno != EINTR:
      return false
  true

proc drain(socket: SocketHandle) =
  ## Says that the reply is over and throws away what still comes: closing with bytes unread would reset the connection,
  ## and the reset may overtake the reply.
  var data {.noinit.}: array[blockSize, byte]
  discard shutdown(socket, SHUT_WR)
  setTimeout(socket, SO_RCVTIMEO, drainSeconds)
  for _ in 1 .. 64:
    if recv(socket, addr data, data.len, 0) <= 0:
      break

proc isHttp(line: string): bool =
  ## Whether a line is METHOD SP target SP HTTP/1.x.
  let words = line.split(' ')
  words.len == 3 and words[0].len > 0 and words[0].allCharsInSet({'A' .. 'Z'}) and words[1].len > 0 and
    words[2] in ["HTTP/1.0", "HTTP/1.1"]

proc unescape(text: string): string =
  var at = 0
  while at < text.len:
    if text[at] == '%' and at + 2 < text.len and text[at + 1 .. at + 2].allCharsInSet(HexDigits):
      result.add chr(fromHex[int](text[at + 1 .. at + 2]))
      at += 3
    else:
      result.add text[at]
      at += 1

proc endOfHead(input: string): int =
  ## Where the head ends that the input begins with; -1 when it is not all there.
  var newline = input.find('\n')
  while newline >= 0:
    if input.continuesWith("\n", newline + 1):
      return newline + 2
    if input.continuesWith("\r\n", newline + 1):
      return newline + 3
    newline = input.find('\n', newline + 1)
  -1

proc parseHead(text: string): Head =
  var isFirst = true
  for line in text.split('\n'):
    let line = line.strip(leading = false, chars = {'\r'})
    if isFirst:
      result.isGet = line.isHttp and line.startsWith("GET ")
      if result.isGet:
        let words = line.split(' ')
        result.target = words[1]
        result.keepAlive = words[2] == "HTTP/1.1"
      isFirst = false
    elif cmpIgnoreCase(line.split(':')[0], "connection") == 0 and ':' in line:
      let value = line.split(':', 1)[1].strip(chars = blanks).toLowerAscii
      if value == "close":
        result.keepAlive = false
      elif value == "keep-alive":
        result.keepAlive = result.isGet

proc httpReply(head: Head, since: MonoTime): string =
  var
    request: Request
    status = badInput
  if head.isGet and head.target.startsWith('/') and parse(unescape(head.target[1 .. ^1]), request):
    status = perform(request, since)
  let reason = case status
    of done: "200 OK"
    of queueTimeout: "408 Request Timeout"
    of badInput: "400 Bad Request"
    of noFile: "404 Not Found"
    of ioError: "500 Internal Server Error"
  let body = if status == done: $elapsedMs(since) & "," & request.path else: reason[4 .. ^1]
  let connection = if head.keepAlive: "keep-alive" else: "close"
  "HTTP/1.1 " & reason & "\r\nContent-Length: " & $body.len & "\r\nConnection: " & connection & "\r\n\r\n" & body

proc converseHttp(client: Client, input: var string) =
  ## Requests one after the other, until one is the last.
  var since = client.accepted
  while true:
    var at = endOfHead(input)
    while at < 0:
      if input.len >= longestHead or not receive(client.socket, input):
        return
      at = endOfHead(input)
    let head = parseHead(input[0 ..< at])
    if not send(client.socket, httpReply(head, since)):
      return
    if not head.keepAlive:
      drain(client.socket)
      return
    input = input[at .. ^1]
    if input.len == 0 and not receive(client.socket, input):
      return
    since = getMonoTime()

proc lineReply(line: string, since: MonoTime): string =
  var request: Request
  if line.len >= longestLine or not parse(line.strip(leading = false, chars = {'\r'}), request):
    return $ord(badInput) & ",0,\n"
  let status = perform(request, since)
  let code = if status == done: request.code else: $ord(status)
  code & "," & $elapsedMs(since) & "," & request.path & "\n"

proc converse(client: Client) {.thread.} =
  ## One connection, from its first byte to its end.
  var one = 1.cint
  discard setsockopt(client.socket, posix.IPPROTO_TCP, TCP_NODELAY, addr one, sizeof(one).SockLen)
  setTimeout(client.socket, SO_RCVTIMEO, idleSeconds)
  setTimeout(client.socket, SO_SNDTIMEO, idleSeconds)
  var
    input = ""
    newline = -1
  while newline < 0 and input.len <= longestLine and receive(client.socket, input):
    newline = input.find('\n')
  if input.len > 0:
    let line = if newline < 0: input else: input[0 ..< newline]
    if newline >= 0 and line.len < longestLine and line.strip(leading = false, chars = {'\r'}).isHttp:
      converseHttp(client, input)
    elif send(client.socket, lineReply(line, client.accepted)):
      drain(client.socket)
  client.socket.close()
  ended.send(client.thread)

proc joinEnded() =
  ## Lets go of the threads that have ended: until they are joined, their stacks stay.
  while true:
    let (dataAvailable, thread) = ended.tryRecv()
    if not dataAvailable:
      break
    joinThread(cast[ptr Thread[Client]](thread)[])
    freeShared(cast[ptr Thread[Client]](thread))

proc main() =
  var port = 0
  for kind, key, value in getopt(longNoVal = @["help"]):
    case key
    of "port": port = parseInt(value)
    of "root":
      setCurrentDir(value)
      reads = true
    else: quit("usage: server --port N [--root DIR]", 2)
  var files: RLimit
  discard getrlimit(RLIMIT_NOFILE, files)
  files.rlim_cur = files.rlim_max
  discard setrlimit(RLIMIT_NOFILE, files)
  ended.open()
  let listener = newSocket()
  listener.setSockOpt(OptReuseAddr, true)
  listener.bindAddr(Port(port), "127.0.0.1")
  listener.listen(readFile("/proc/sys/net/core/somaxconn").strip.parseInt.cint)
  while true:
    joinEnded()
    let socket = accept4(listener.getFd, nil, nil, SOCK_CLOEXEC)
    if cint(socket) < 0: # out of descriptors: those that end free some
      stderr.writeLine("nim: accept: ", osErrorMsg(osLastError()))
      sleep(100)
      continue
    let thread = createShared(Thread[Client])
    try:
      createThread(thread[], converse, Client(socket: socket, accepted: getMonoTime(), thread: thread))
    except ResourceExhaustedError:
      stderr.writeLine("nim: ", getCurrentExceptionMsg())
      freeShared(thread)
      socket.close()

main()
