"""Never a lost row: what a cache withstands, one file a promise.

- test_kill: a job killed at any moment, also between any two file operations of a commit, and started again, ends with
  the very files of one left in peace; readers beside it see whole rows only.
- test_interrupt: Ctrl-C stores what is computed, says what was kept and how to go on, and leaves soon and wholly.
- test_full_disk: the error names path and bytes, what was committed stays valid, and with room the job completes.
- test_concurrency: four processes embed into one cache, some of them killed; every key is stored once.
- test_dead_parts: a scan, reader, decoder, device or writer that dies ends the job at once with its own error.
- test_corruption: any flipped byte or shortened file, two chunks swapped or one missing, is found by `fluoro cache
  verify` with array, chunk and rows; `--repair` drops and restores exactly those rows.
- test_row_numbers: compaction, forgetting and removal give rows other numbers; whoever held the old ones, in memory or
  on their way to a worker, still gets the rows of the same keys.
- test_upkeep: repair, compaction, removal, export, import and forgetting, also in the records of runs, may be killed at
  any file operation, with a reader beside.
- test_bad_images: broken PNG, JPEG and DICOM files by the thousand end in a reason each, never in a crash, a hang or a
  zero vector.

The full numbers run by `make stress`, a sample of each by `make test`.
"""
