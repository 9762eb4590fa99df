"""The server application on top of the diskread library: protocols, HTTP, command line."""
