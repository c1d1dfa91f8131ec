"""Never a lost row: what a cache withstands, one file a promise.

- test_corruption: any flipped byte or shortened file, two chunks swapped or one missing, is found by `fluoro cache
  verify` with array, chunk and rows; `--repair` drops and restores exactly those rows.
- test_upkeep: repair, compaction, removal and forgetting may be killed at any file operation, with a reader beside.
- test_bad_images: broken PNG, JPEG and DICOM files by the thousand end in a reason each, never in a crash, a hang or a
  zero vector.

The full numbers run by `make stress`, a sample of each by `make test`.
"""
