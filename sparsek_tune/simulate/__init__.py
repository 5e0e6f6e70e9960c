"""Search strategies replayed over a sweep: what each would have found, after how many measurements and seconds."""
