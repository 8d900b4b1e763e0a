"""The demo: one process, two doors, one core. Also the subject of the end-to-end tests."""
