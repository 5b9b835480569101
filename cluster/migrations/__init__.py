"""The store's schema, one numbered file a change. `cluster.store.Store.migrate` runs them; nothing else changes a table."""
