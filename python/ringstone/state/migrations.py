"""The SQLite schema, as the ordered statements that lead from one version to the next.

A released migration never changes; a new version is appended. Index 0 leads from an empty database to version
1.
"""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE pools (
            name TEXT PRIMARY KEY,
            type TEXT NOT NULL,
            path TEXT,
            capacity INTEGER CHECK (capacity > 0),
            options TEXT NOT NULL DEFAULT '{}',
            created_ns INTEGER NOT NULL
        ) STRICT
        """,
        """
        CREATE TABLE volumes (
            name TEXT PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            pool TEXT NOT NULL REFERENCES pools (name) ON DELETE RESTRICT,
            size INTEGER NOT NULL CHECK (size > 0),
            block_size INTEGER NOT NULL CHECK (block_size IN (512, 4096)),
            state TEXT NOT NULL CHECK (state IN ('creating', 'ready', 'deleting')),
            created_ns INTEGER NOT NULL
        ) STRICT
        """,
        "CREATE INDEX volumes_by_pool ON volumes (pool)",
        """
        CREATE TABLE attachments (
            volume TEXT PRIMARY KEY REFERENCES volumes (name) ON DELETE RESTRICT,
            socket TEXT NOT NULL UNIQUE,
            queues INTEGER NOT NULL CHECK (queues BETWEEN 1 AND 64),
            read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
            created_ns INTEGER NOT NULL
        ) STRICT
        """,
    ),
    (
        """
        CREATE TABLE hosts (
            name TEXT PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            addresses TEXT NOT NULL,
            version TEXT NOT NULL,
            cores TEXT NOT NULL,
            free_cores INTEGER NOT NULL,
            seen_ns INTEGER NOT NULL,
            created_ns INTEGER NOT NULL
        ) STRICT
        """,
        # Every pool there was is on this machine, and every volume still has its first owner.
        "ALTER TABLE pools ADD COLUMN host TEXT",
        "UPDATE pools SET host = 'localhost'",
        "ALTER TABLE volumes ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0 CHECK (epoch >= 0)",
        # Made anew, as a socket is one of its host.
        """
        CREATE TABLE attachments_2 (
            volume TEXT PRIMARY KEY REFERENCES volumes (name) ON DELETE RESTRICT,
            socket TEXT NOT NULL,
            queues INTEGER NOT NULL CHECK (queues BETWEEN 1 AND 64),
            read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
            created_ns INTEGER NOT NULL,
            host TEXT NOT NULL,
            epoch INTEGER NOT NULL CHECK (epoch >= 0),
            ha INTEGER NOT NULL CHECK (ha IN (0, 1)),
            client TEXT NOT NULL,
            UNIQUE (host, socket)
        ) STRICT
        """,
        """
        INSERT INTO attachments_2
        SELECT volume, socket, queues, read_only, created_ns, 'localhost', 0, 0, '{}' FROM attachments
        """,
        "DROP TABLE attachments",
        "ALTER TABLE attachments_2 RENAME TO attachments",
    ),
    (
        "ALTER TABLE attachments ADD COLUMN socket_owner TEXT",
        "ALTER TABLE attachments ADD COLUMN socket_group TEXT",
        "ALTER TABLE attachments ADD COLUMN socket_mode TEXT",
    ),
)

SCHEMA_VERSION = len(MIGRATIONS)
