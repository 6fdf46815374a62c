"""Which memory holds the last value of a key while older ones pile up?"""
