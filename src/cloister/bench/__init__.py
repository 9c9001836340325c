"""Speed and overhead tables, measured on the machine at hand."""
