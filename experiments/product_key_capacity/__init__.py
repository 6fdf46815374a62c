"""The capacity of a product-key memory for random facts."""
