"""What each part of a memory that learns while it reads is for, shown without training a model; see README.md."""
