"""The command line `titans-dist`. Importing it is cheap; every command imports what it needs when it runs."""
