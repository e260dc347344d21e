"""Tidewire in ten short lessons. Read the files in their order; each is a test that runs.

1. `test_01_items.py`: an item is written, read, changed and deleted.
2. `test_02_changes.py`: users who may read an item receive its changes.
3. `test_03_order.py`: every reader receives the same changes in the same order.
4. `test_04_resume.py`: a reader that was away continues where it was.
5. `test_05_retries.py`: a write that is repeated is done once.
6. `test_06_memberships.py`: groups decide who reads and writes.
7. `test_07_topics.py`: large audiences follow topics.
8. `test_08_transactions.py`: several items change together, or not at all.
9. `test_09_queries.py`: pages, indexes and live views.
10. `test_10_time.py`: items expire.
"""
