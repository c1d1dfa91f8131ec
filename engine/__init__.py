"""Bytes to pixels to embeddings to cache to index; data sets, their labels, splits and boxes as columns."""
