"""Looking after a cache: verify, repair, compact, export, import, remove and forget.

Everything that renames folders is for caches on a local disk, happens under the array's lock, and leaves at any moment
either what was there or what is to be there; who has the old one open keeps reading it whole.
"""
