"""Questions and their answers: a folder each, with a sweep, rows that were measured, and a report made from them."""
