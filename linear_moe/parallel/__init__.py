"""Context parallelism: layouts, LASP-2 and halos; knows segments, no mixer."""
