#include "check.h"
TEST(none) {}
