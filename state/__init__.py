"""What the processes of one replica share: tables in one block of shared memory, each with one writer per row."""
