"""The nine public benchmarks: how their rows are read, asked and labelled."""
