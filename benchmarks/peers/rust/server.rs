//! Rust, one thread of the standard library per connection: a blocking read waits in its connection's thread, which the
//! kernel sets aside; there are as many threads as connections, without a limit, detached and with small stacks.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::io::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, ffi::OsStr, process, sync::Arc, thread};

const LONGEST_LINE: usize = 4096;
const LONGEST_HEAD: usize = 65536;
const LONGEST_MS: i64 = 3_600_000;
const LONGEST_WAIT: Duration = Duration::from_secs(4);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
const BLOCK: usize = 16 * 1024; // it is zeroed, and so costs each thread that much memory
const STACK: usize = 256 * 1024;

/// How a request ends.
#[derive(Clone, Copy, PartialEq)]
enum Status {
    Done,
    QueueTimeout = 1,
    BadInput = 2,
    NoFile = 5,
    IoError = 6,
}

/// One `RC,MS,PATH`. The path is bytes; the status that the client wants back is kept as it came.
struct Request<'a> {
    code: &'a [u8],
    sleep: Duration,
    path: &'a [u8],
}

/// An integer of 1 to 18 digits between blanks: its bytes without them, and its value.
fn parse_integer(field: &[u8]) -> Option<(&[u8], i64)> {
    let is_blank = |byte: &u8| *byte == b' ' || *byte == b'\t';
    let begin = field.iter().position(|byte| !is_blank(byte))?;
    let end = field.iter().rposition(|byte| !is_blank(byte))? + 1;
    let text = &field[begin..end];
    let digits = text.strip_prefix(b"+").or_else(|| text.strip_prefix(b"-")).unwrap_or(text);
    if digits.len() > 18 {
        return None;
    }
    Some((text, std::str::from_utf8(text).ok()?.parse().ok()?))
}

/// `RC,MS,PATH` without its line end; `None` when it is bad input.
fn parse(text: &[u8]) -> Option<Request<'_>> {
    let mut fields = text.split(|byte| *byte == b',');
    let (code, ms, path) = (fields.next()?, fields.next()?, fields.next()?);
    if fields.next().is_some() || path.is_empty() {
        return None;
    }
    let (code, _) = parse_integer(code)?;
    let (_, ms) = parse_integer(ms)?;
    if !(0..=LONGEST_MS).contains(&ms) {
        return None;
    }
    Some(Request { code, sleep: Duration::from_millis(ms as u64), path })
}

/// Reads a file to its end and throws the data away.
fn read_file(root: &Path, path: &[u8]) -> io::Result<()> {
    if path.starts_with(b"/") || path.contains(&0) || path.split(|byte| *byte == b'/').any(|part| part == b"..") {
        return Err(io::ErrorKind::NotFound.into());
    }
    let file = File::open(root.join(OsStr::from_bytes(path)))?;
    let mut block = [0; BLOCK];
    let mut offset = 0;
    loop {
        match file.read_at(&mut block, offset) {
            Ok(0) => return Ok(()),
            Ok(count) => offset += count as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The blocking read: everything in it waits in the thread that calls it.
fn perform(request: &Request, root: Option<&Path>, since: Instant) -> Status {
    const ENOTDIR: i32 = 20;
    const EISDIR: i32 = 21;
    if since.elapsed() >= LONGEST_WAIT {
        return Status::QueueTimeout;
    }
    thread::sleep(request.sleep);
    match root.map_or(Ok(()), |root| read_file(root, request.path)) {
        Ok(()) => Status::Done,
        Err(error) => match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied, _) => Status::NoFile,
            (_, Some(ENOTDIR | EISDIR)) => Status::NoFile,
            _ => Status::IoError,
        },
    }
}

/// A connection and what it has sent that nobody has used.
struct Client {
    stream: TcpStream,
    input: Vec<u8>,
}

impl Client {
    /// Receives some more; false at the end of the input.
    fn receive(&mut self) -> io::Result<bool> {
        let mut data = [0; 4096];
        loop {
            match self.stream.read(&mut data) {
                Ok(count) => {
                    self.input.extend_from_slice(&data[..count]);
                    return Ok(count > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Says that the reply is over and throws away what still comes: closing with bytes unread would reset the
    /// connection, and the reset may overtake the reply.
    fn drain(&mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)?;
        self.stream.set_read_timeout(Some(DRAIN_TIMEOUT))?;
        let mut data = [0; 4096];
        for _ in 0..1024 {
            if self.stream.read(&mut data)? == 0 {
                break;
            }
        }
        Ok(())
    }
}

/// One connection, from its first byte to its end.
fn converse(stream: TcpStream, root: Option<&Path>, accepted: Instant) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE_TIMEOUT))?;
    stream.set_write_timeout(Some(IDLE_TIMEOUT))?;
    let mut client = Client { stream, input: Vec::new() };
    let newline = loop {
        let newline = client.input.iter().position(|byte| *byte == b'\n');
        if newline.is_some() || client.input.len() > LONGEST_LINE || !client.receive()? {
            break newline;
        }
    };
    if client.input.is_empty() {
        return Ok(());
    }
    let line = &client.input[..newline.unwrap_or(client.input.len())];
    let too_long = line.len() >= LONGEST_LINE;
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if newline.is_some() && !too_long && parse_request_line(line).is_some() {
        return converse_http(client, root, accepted);
    }
    let mut reply = Vec::new();
    match parse(line).filter(|_| !too_long) {
        None => write!(reply, "{},0,\n", Status::BadInput as i32)?,
        Some(request) => {
            match perform(&request, root, accepted) {
                Status::Done => reply.extend_from_slice(request.code),
                status => write!(reply, "{}", status as i32)?,
            }
            write!(reply, ",{},", accepted.elapsed().as_millis())?;
            reply.extend_from_slice(request.path);
            reply.push(b'\n');
        }
    }
    client.stream.write_all(&reply)?;
    client.drain()
}

/// `METHOD SP target SP HTTP/1.x`: method, target, and whether x is 1.
fn parse_request_line(line: &[u8]) -> Option<(&[u8], &[u8], bool)> {
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let is_method = !method.is_empty() && method.iter().all(u8::is_ascii_uppercase);
    if words.next().is_some() || !is_method || target.is_empty() {
        return None;
    }
    match version {
        b"HTTP/1.1" => Some((method, target, true)),
        b"HTTP/1.0" => Some((method, target, false)),
        _ => None,
    }
}

/// Where the head ends that `input` begins with.
fn end_of_head(input: &[u8]) -> Option<usize> {
    let newlines = input.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    newlines
        .filter_map(|next| match &input[next..] {
            [b'\n', ..] => Some(next + 1),
            [b'\r', b'\n', ..] => Some(next + 2),
            _ => None,
        })
        .next()
}

fn unescape(text: &[u8]) -> Vec<u8> {
    let digit = |at: usize| text.get(at).and_then(|byte| (*byte as char).to_digit(16));
    let mut plain = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        match (text[at], digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                plain.push((high * 16 + low) as u8);
                at += 3;
            }
            (byte, ..) => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    plain
}

/// Requests one after the other, until one is the last.
fn converse_http(mut client: Client, root: Option<&Path>, mut since: Instant) -> io::Result<()> {
    loop {
        let end = loop {
            if let Some(end) = end_of_head(&client.input) {
                break end;
            }
            if client.input.len() >= LONGEST_HEAD || !client.receive()? {
                return Ok(());
            }
        };
        let (reply, keep_alive) = answer_http(&client.input[..end], root, since);
        client.stream.write_all(&reply)?;
        if !keep_alive {
            return client.drain();
        }
        client.input.drain(..end);
        if client.input.is_empty() && !client.receive()? {
            return Ok(());
        }
        since = Instant::now();
    }
}

/// The response to a head, and whether the connection is kept after it.
fn answer_http(head: &[u8], root: Option<&Path>, since: Instant) -> (Vec<u8>, bool) {
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let request_line = lines.next().and_then(parse_request_line).filter(|(method, ..)| *method == b"GET");
    let mut keep_alive = matches!(request_line, Some((_, _, true)));
    for line in lines {
        let line = String::from_utf8_lossy(line).to_ascii_lowercase();
        match line.strip_prefix("connection:").map(str::trim) {
            Some("close") => keep_alive = false,
            Some("keep-alive") => keep_alive = request_line.is_some(),
            _ => {}
        }
    }
    let text = request_line.and_then(|(_, target, _)| target.strip_prefix(b"/")).map(unescape);
    let request = text.as_deref().and_then(parse);
    let status = request.as_ref().map_or(Status::BadInput, |request| perform(request, root, since));
    let (reason, body) = match (status, request) {
        (Status::Done, Some(request)) => {
            let total = format!("{},", since.elapsed().as_millis());
            ("200 OK", [total.as_bytes(), request.path].concat())
        }
        (Status::QueueTimeout, _) => ("408 Request Timeout", b"Request Timeout".to_vec()),
        (Status::NoFile, _) => ("404 Not Found", b"Not Found".to_vec()),
        (Status::IoError, _) => ("500 Internal Server Error", b"Internal Server Error".to_vec()),
        _ => ("400 Bad Request", b"Bad Request".to_vec()),
    };
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let length = body.len();
    let head = format!("HTTP/1.1 {reason}\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n");
    ([head.into_bytes(), body].concat(), keep_alive)
}

/// What the standard library, which links the C library anyway, does not offer.
mod c {
    #[repr(C)]
    pub struct Limit {
        pub soft: u64,
        pub hard: u64,
    }
    pub const RLIMIT_NOFILE: i32 = 7;
    extern "C" {
        pub fn getrlimit(resource: i32, limit: *mut Limit) -> i32;
        pub fn setrlimit(resource: i32, limit: *const Limit) -> i32;
        pub fn listen(socket: i32, backlog: i32) -> i32;
    }
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let longest = std::fs::read_to_string("/proc/sys/net/core/somaxconn")?;
    let backlog = longest.trim().parse().unwrap_or(4096);
    let mut files = c::Limit { soft: 0, hard: 0 };
    // A second listen() is allowed, and changes the backlog; the first one's is 128.
    unsafe {
        c::listen(listener.as_raw_fd(), backlog);
        if c::getrlimit(c::RLIMIT_NOFILE, &mut files) == 0 {
            files.soft = files.hard;
            c::setrlimit(c::RLIMIT_NOFILE, &files);
        }
    }
    Ok(listener)
}

fn main() {
    let mut port = None;
    let mut root: Option<Arc<Path>> = None;
    let mut words = env::args_os().skip(1);
    while let (Some(option), Some(value)) = (words.next(), words.next()) {
        match option.to_str() {
            Some("--port") => port = value.to_str().and_then(|text| text.parse().ok()),
            Some("--root") => root = Some(PathBuf::from(value).into()),
            _ => port = None,
        }
    }
    let listener = port
        .ok_or("usage: server --port N [--root DIR]".to_string())
        .and_then(|port| listen(port).map_err(|error| format!("rust: port {port}: {error}")));
    let listener = listener.unwrap_or_else(|error| {
        eprintln!("{error}");
        process::exit(1);
    });
    loop {
        let started = listener.accept().and_then(|(stream, _)| {
            let (root, accepted) = (root.clone(), Instant::now());
            // Errors of a connection: the client has gone, or says nothing.
            thread::Builder::new().stack_size(STACK).spawn(move || converse(stream, root.as_deref(), accepted).ok())
        });
        if let Err(error) = started {
            eprintln!("rust: {error}"); // out of descriptors or threads: those that end free some
            thread::sleep(Duration::from_millis(100));
        }
    }
}
