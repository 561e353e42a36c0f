"""Where the master keeps everything: keys with values, every change numbered. SQLite embedded, or etcd."""
