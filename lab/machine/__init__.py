"""The computer: what a person may set, where and how it computes, files, and the console."""
