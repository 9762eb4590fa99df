// Scala, a Future per connection on the global execution context, all of it marked `blocking`: the context has a thread
// for each that blocks, without a limit in Scala 2.11, and a blocking read waits in the thread of its connection.

import java.io.IOException
import java.net.{InetAddress, ServerSocket, Socket}
import java.nio.ByteBuffer
import java.nio.channels.FileChannel
import java.nio.charset.StandardCharsets.{ISO_8859_1, UTF_8}
import java.nio.file._

import scala.annotation.tailrec
import scala.concurrent.ExecutionContext.Implicits.global
import scala.concurrent.{Future, blocking}
import scala.io.Source
import scala.util.matching.Regex

object Clock {
  def millisecondsSince(nanoTime: Long): Long = (System.nanoTime - nanoTime) / 1000000
}

/** One `RC,MS,PATH`. Text is ISO 8859-1 everywhere: a character for each byte, so that paths come back as they went. */
final case class Request(status: String, milliseconds: Long, path: String)

object Request {
  private val LongestMs = 3600000L
  private val Number = "[ \t]*([+-]?[0-9]{1,18})[ \t]*".r
  private val Escape = "%([0-9A-Fa-f]{2})".r

  /** None when it is bad input. */
  def parse(text: String): Option[Request] = text.split(",", -1) match {
    case Array(Number(status), Number(milliseconds), path)
        if path.nonEmpty && milliseconds.toLong >= 0 && milliseconds.toLong <= LongestMs =>
      Some(Request(status, milliseconds.toLong, path))
    case _ => None
  }

  /** The same of an HTTP target, `/RC,MS,PATH` percent-encoded. */
  def parseTarget(target: String): Option[Request] =
    if (!target.startsWith("/")) None
    else parse(Escape.replaceAllIn(target.tail, escape =>
      Regex.quoteReplacement(Integer.parseInt(escape.group(1), 16).toChar.toString)))
}

/** What came of a request, and how long that took since it began to wait. */
final case class Outcome(status: String, milliseconds: Long)

object Status {
  val QueueTimeout = "1"
  val BadInput = "2"
  val NoFile = "5"
  val IoError = "6"
}

/** The blocking read, in whatever thread calls it; without a root it only sleeps. */
final class Reader(root: Option[Path]) {
  private val LongestWaitMs = 4000
  private val Block = 65536

  /** Carry a request out, unless it has waited too long. */
  def perform(request: Request, since: Long): Outcome = {
    val status = if (Clock.millisecondsSince(since) < LongestWaitMs) read(request) else Status.QueueTimeout
    Outcome(status, Clock.millisecondsSince(since))
  }

  private def read(request: Request): String = {
    Thread.sleep(request.milliseconds)
    root match {
      case None => request.status
      case Some(_) if request.path.startsWith("/") || request.path.split("/", -1).contains("..") => Status.NoFile
      case Some(directory) =>
        // The JVM opens names that are text of the locale's encoding: one that is not UTF-8 is a file that is not
        // there.
        try {
          readToItsEnd(directory.resolve(new String(request.path.getBytes(ISO_8859_1), UTF_8)))
          request.status
        } catch {
          case _: NoSuchFileException | _: AccessDeniedException | _: InvalidPathException => Status.NoFile
          case error: FileSystemException if error.getReason == "Not a directory" => Status.NoFile
          // open(2) takes a directory; it is pread(2) that does not.
          case error: IOException => if (error.getMessage == "Is a directory") Status.NoFile else Status.IoError
        }
    }
  }

  private def readToItsEnd(file: Path): Unit = {
    val channel = FileChannel.open(file)
    try {
      val block = ByteBuffer.allocate(Block)
      @tailrec def readFrom(offset: Long): Unit = {
        block.clear()
        val count = channel.read(block, offset)
        if (count > 0) readFrom(offset + count)
      }
      readFrom(0)
    } finally channel.close()
  }
}

/** One connection, from its first byte to its end. */
final class Conversation(socket: Socket, accepted: Long, reader: Reader) {
  import Conversation._

  private val input = socket.getInputStream
  private val block = new Array[Byte](BlockSize)
  private var received = ""

  def run(): Unit =
    try {
      socket.setTcpNoDelay(true)
      socket.setSoTimeout(IdleTimeoutMs)
      while (!received.contains('\n') && received.length <= LongestLine && receive()) {}
      received.takeWhile(_ != '\n').stripSuffix("\r") match {
        case RequestLine(_, _, _) => converseHttp(accepted)
        case _ if received.isEmpty => ()
        case line =>
          val request = if (line.length < LongestLine) Request.parse(line) else None
          val outcome = answer(request, accepted)
          send(s"${outcome.status},${outcome.milliseconds},${request.fold("")(_.path)}\n")
          drain()
      }
    } catch {
      case _: IOException => () // the client has gone, or says nothing
    } finally socket.close()

  @tailrec private def converseHttp(since: Long): Unit = nextHead() match {
    case None => ()
    case Some(head) =>
      val lines = head.split("\r?\n", 2)
      val headers = if (lines.length > 1) lines(1) else ""
      val (request, keepAlive) = lines(0) match {
        case RequestLine("GET", target, minor) => (Request.parseTarget(target), staysOpen(minor, headers))
        case _ => (None, false)
      }
      send(httpReply(request, answer(request, since), keepAlive))
      if (!keepAlive) drain()
      else if (received.nonEmpty || receive()) converseHttp(System.nanoTime)
  }

  /** Request line and headers without the empty line, which is taken away too; None when there is none. */
  @tailrec private def nextHead(): Option[String] = HeadEnd.findFirstMatchIn(received) match {
    case Some(end) =>
      val head = received.substring(0, end.start)
      received = received.substring(end.end)
      Some(head)
    case None => if (received.length < LongestHead && receive()) nextHead() else None
  }

  private def answer(request: Option[Request], since: Long): Outcome =
    request.fold(Outcome(Status.BadInput, 0))(reader.perform(_, since))

  /** Wait for more bytes; false at the end of input. */
  private def receive(): Boolean = {
    val count = input.read(block)
    if (count > 0) received += new String(block, 0, count, ISO_8859_1)
    count > 0
  }

  private def send(reply: String): Unit = socket.getOutputStream.write(reply.getBytes(ISO_8859_1))

  /** To close with bytes unread would reset the connection, and the reset may overtake the reply. */
  private def drain(): Unit = {
    socket.shutdownOutput()
    socket.setSoTimeout(DrainMs)
    val begin = System.nanoTime
    while (Clock.millisecondsSince(begin) < DrainMs && input.read(block) > 0) {}
  }
}

object Conversation {
  private val LongestLine = 4096
  private val LongestHead = 65536
  private val BlockSize = 8192
  private val IdleTimeoutMs = 60000
  private val DrainMs = 1000
  private val RequestLine = """([A-Z]+) (\S+) HTTP/1\.([01])""".r
  private val HeadEnd = "\r\n\r\n|\n\n".r
  private val Connection = "(?im)^connection:(.*)$".r
  private val Reasons = Map(
    200 -> "OK", 400 -> "Bad Request", 404 -> "Not Found", 408 -> "Request Timeout", 500 -> "Internal Server Error")

  private def staysOpen(minor: String, headers: String): Boolean = {
    val asked = Connection.findAllMatchIn(headers).map(_.group(1).trim.toLowerCase).toSeq.lastOption
    asked.contains("keep-alive") || (minor == "1" && !asked.contains("close"))
  }

  private def httpReply(request: Option[Request], outcome: Outcome, keepAlive: Boolean): String = {
    val (code, body) = request match {
      case Some(Request(outcome.status, _, path)) => (200, s"${outcome.milliseconds},$path")
      case _ =>
        val code = outcome.status match {
          case Status.QueueTimeout => 408
          case Status.BadInput => 400
          case Status.NoFile => 404
          case _ => 500
        }
        (code, Reasons(code))
    }
    val connection = if (keepAlive) "keep-alive" else "close"
    s"HTTP/1.1 $code ${Reasons(code)}\r\nContent-Length: ${body.length}\r\nConnection: $connection\r\n\r\n$body"
  }
}

object Server {
  def main(arguments: Array[String]): Unit = {
    val options = arguments.grouped(2).collect { case Array(name, value) => name -> value }.toMap
    val reader = new Reader(options.get("--root").map(Paths.get(_)))
    val listener = new ServerSocket(options("--port").toInt, backlog(), InetAddress.getByName("127.0.0.1"))
    while (true)
      try {
        val socket = listener.accept()
        val accepted = System.nanoTime
        Future(blocking(new Conversation(socket, accepted, reader).run()))
      } catch {
        case error @ (_: IOException | _: OutOfMemoryError) =>
          // out of descriptors or threads: those that end free some
          Console.err.println(s"scala: $error")
          Thread.sleep(100)
      }
  }

  /** The longest that the system allows. */
  private def backlog(): Int = {
    val file = Source.fromFile("/proc/sys/net/core/somaxconn")
    try file.mkString.trim.toInt
    finally file.close()
  }
}
