/* The only file that knows a BLAS. */
#include "../internal.h"

const char *kl_blas_name(void) { return "none"; }
