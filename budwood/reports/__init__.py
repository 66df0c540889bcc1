"""What a run did: the figures, as a record for machines and as pages for people."""
