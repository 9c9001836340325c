"""What the hardware said: total, bounded parsers from bytes to frozen values. No I/O, no belief."""
