#include "binding.h"

PyMethodDef kl_py_ops_dense[] = {
    { NULL, NULL, 0, NULL },
};
