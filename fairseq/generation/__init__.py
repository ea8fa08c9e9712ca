"""What sequence generation consists of; its face is `fairseq.sequence_generator`."""
