"""Runs the SQL on stdin in ClickHouse's engine: `query.py FOLDER`. FOLDER has the tables. Prints tab-separated rows."""

import sys

from chdb import session

store = session.Session(sys.argv[1])
result = store.query(sys.stdin.read(), "TabSeparated")
sys.stdout.buffer.write(result.bytes())
