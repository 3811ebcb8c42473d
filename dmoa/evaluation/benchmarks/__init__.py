"""The nine public benchmarks: how their rows are read, asked, labelled and scored."""
