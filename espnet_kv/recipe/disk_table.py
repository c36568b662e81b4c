"""A dictionary on disk: its memory does not grow with the number of its keys."""

import pickle
import sqlite3
from collections.abc import ItemsView, Iterator, MutableMapping

from espnet_kv.errors import UserError

CACHE = 500
"""Kilobytes of a table that are kept in memory."""


class Table[Value](MutableMapping[str, Value]):
    """A dictionary of picklable values by strings, which it lists in the order of code points.

    It is a temporary database of SQLite. What does not fit into its cache is a file in $TMPDIR, or
    /var/tmp, which is removed with the object. It must not be changed while its keys
    are listed.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        for command in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            f"PRAGMA cache_size = -{CACHE}",
            "CREATE TABLE items (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID",
            "BEGIN",
        ):
            self._execute(command)

    def _execute(self, command: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._database.execute(command, values)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"a table of this run cannot be kept on disk ({error}): set TMPDIR to a folder "
                "with more room"
            ) from error

    def __getitem__(self, key: str) -> Value:
        found = self._execute("SELECT value FROM items WHERE key = ?", key).fetchone()
        if found is None:
            raise KeyError(key)
        return pickle.loads(found[0])

    def __setitem__(self, key: str, value: Value) -> None:
        self._execute("REPLACE INTO items VALUES (?, ?)", key, pickle.dumps(value))

    def __delitem__(self, key: str) -> None:
        if not self._execute("DELETE FROM items WHERE key = ?", key).rowcount:
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return self._execute("SELECT 1 FROM items WHERE key = ?", key).fetchone() is not None

    def __iter__(self) -> Iterator[str]:
        return (key for (key,) in self._execute("SELECT key FROM items ORDER BY key"))

    def __len__(self) -> int:
        return self._execute("SELECT count(*) FROM items").fetchone()[0]

    def items(self) -> ItemsView[str, Value]:
        """Keys and values, by one query for all of them."""
        return _Items(self)


class _Items[Value](ItemsView[str, Value]):
    _mapping: Table[Value]

    def __iter__(self) -> Iterator[tuple[str, Value]]:
        rows = self._mapping._execute("SELECT key, value FROM items ORDER BY key")
        return ((key, pickle.loads(value)) for key, value in rows)
