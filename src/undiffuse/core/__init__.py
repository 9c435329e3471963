"""Floor 0: shapes, random streams, errors. Imports nothing of the library."""
