"""Real pipelines of every video family at tiny sizes, one file a group, each a function that builds one."""
