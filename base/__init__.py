"""What everything else may use: the error tree, configuration, ids, deadlines, logging. Imports nothing of ours."""
