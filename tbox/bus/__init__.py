"""CAN buses and recordings: frames in, allow-listed frames out. Knows no DBC and no signal."""
