"""Which samples to label next: pure functions of what networks say of a pool.

Every function gives row numbers of the pool, ``(count,)`` int64, in the order they were chosen;
where several rows are equally good, the first of them.
"""
