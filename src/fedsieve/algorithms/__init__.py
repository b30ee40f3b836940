"""One file a method. The file's name is the method's name; `base` says what a method is and finds them."""
