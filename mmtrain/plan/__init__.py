"""`mmtrain plan`: what a run will do, take and need, before it is started."""
