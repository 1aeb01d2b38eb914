"""Four mistakes of real test suites. Each case passes unless a connect hits its own port.

`cargo xtask suites` runs this in a network namespace with a small port range.
"""

import socket
import struct
import threading
import unittest

ATTEMPTS = 4_000
HOST = "127.0.0.1"
OTHER_CASES = (42_010, 42_020, 42_040)


def attempt(port):
    client = socket.socket()
    client.settimeout(10)
    try:
        client.connect((HOST, port))
    except OSError:
        client.close()
        return None
    return client


def first_of_many(port):
    attempts = (attempt(port) for _ in range(ATTEMPTS))
    return next((client for client in attempts if client), None)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Server:
    """Greets each client."""

    def __init__(self, port):
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((HOST, port))
        self.listener.listen()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            client.recv(16)
            client.sendall(b"welcome")
            client.close()


class Suite(unittest.TestCase):
    def test_a_client_waits_for_its_server(self):
        client = first_of_many(42_010)
        if not client:
            self.addCleanup(Server(42_010).listener.close)
            client = attempt(42_010)
        self.addCleanup(client.close)
        client.sendall(b"hello")
        self.assertEqual(client.recv(16), b"welcome")

    def test_a_server_comes_back(self):
        client = first_of_many(42_020)
        if client:
            self.addCleanup(client.close)
        # A server that logs the error and goes on without a listener is the worse case.
        self.addCleanup(Server(42_020).listener.close)

    def test_a_port_that_was_given_back_is_dead(self):
        dead = OTHER_CASES[0]
        while dead in OTHER_CASES:
            server = Server(0)
            client = attempt(server.listener.getsockname()[1])
            dead = client.getsockname()[1]
            reset(client)
            server.listener.close()
        self.assertIsNone(first_of_many(dead), f"nobody listens on {dead}")

    def test_a_probe_finds_no_listener(self):
        for _ in range(ATTEMPTS):
            client = attempt(42_040)
            if client:
                client.close()
                self.fail("nobody listens on 42040")


if __name__ == "__main__":
    unittest.main()
