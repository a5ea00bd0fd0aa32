"""Other engines seen through our names: one module an engine, each imported by name when it is wanted."""
