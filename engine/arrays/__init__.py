"""Keyed arrays: a payload, its keys and a checksum a row, in Zarr v3.

`keyed_array` is the room's door: rows come in as keys and payload and go out by row number. Around it:

- what stands on disk: `array_format`, `row_check`;
- where: `storage` (a local folder: `durable`, `lock`, `folder_swap`) and `remote_storage` (whatever fsspec opens);
- writing: `array_commit`; finding: `row_lookup`; reading: `chunks`, `chunk_map` over `address_range`.
"""
