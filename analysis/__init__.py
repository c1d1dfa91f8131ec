"""Arrays and a loaded encoder to numbers, trained heads and towers, heatmaps, figures; no cache, no command line."""
