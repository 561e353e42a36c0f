"""The kinds that the master serves. A kind is data: a row of the table, its published schema, its rules."""
