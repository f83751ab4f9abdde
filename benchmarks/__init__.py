"""Programs that measure; each prints a table and writes its rows as JSON (docs/performance.md, docs/results.md)."""

from coalora.allocator import keep_freed_memory

keep_freed_memory()  # as every stage of a pipeline does
