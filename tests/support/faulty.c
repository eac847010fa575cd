/* A PKCS#11 module for tests: the real one behind it, with faults on command. For each function below a file of that name
 * in $KEYBROKER_FAULTS may say "SKIP TIMES CODE MILLISECONDS PID":
 *
 *   SKIP          calls that pass before the fault begins
 *   TIMES         calls that it hits; -1 for all
 *   CODE          what is returned instead of calling the real function; 0: it is called, and its failure hidden;
 *                 -1: it is called, and its result kept; below: it is called, and its failure becomes -CODE;
 *                 2^40 and more: it is called, and its success becomes CODE - 2^40; 2^41: the process crashes
 *   MILLISECONDS  slept before anything else
 *   PID           the one process that is hit; 0 for all
 *
 * A file `flags` holds a number that is added to the flags of CK_TOKEN_INFO. While a file `nul` is there, the texts of
 * CK_TOKEN_INFO are padded with NUL.
 *
 * Every call of these functions writes two lines to the file `calls`: "PID NAME begins" and "PID NAME ends CODE". */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long ulong_t;

/* CK_FUNCTION_LIST of version 2: the functions in the order of the standard. */
struct list {
  unsigned char version[2];
  void *functions[68];
};

static struct list *real;
static struct list ours;

struct plan {
  long skip, times, code, milliseconds, pid;
};

static int open_in_folder(const char *name, int flags) {
  char path[4096];
  const char *folder = getenv("KEYBROKER_FAULTS");
  if (!folder) return -1;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return open(path, flags | O_CLOEXEC, 0600);
}

static void note(const char *name, const char *what, long code) {
  char line[128];
  int file = open_in_folder("calls", O_WRONLY | O_APPEND | O_CREAT);
  if (file < 0) return;
  int length = code < 0 ? snprintf(line, sizeof line, "%d %s %s\n", getpid(), name, what)
                        : snprintf(line, sizeof line, "%d %s %s %ld\n", getpid(), name, what, code);
  if (write(file, line, length) != length) abort();
  close(file);
}

/* Whether the fault of this function hits this call. */
static int is_hit(const char *name, struct plan *plan) {
  char text[128] = {0};
  int file = open_in_folder(name, O_RDWR), hit = 0;
  if (file < 0) return 0;
  flock(file, LOCK_EX);
  if (read(file, text, sizeof text - 1) > 0 &&
      sscanf(text, "%ld %ld %ld %ld %ld", &plan->skip, &plan->times, &plan->code, &plan->milliseconds, &plan->pid) == 5 &&
      (plan->pid == 0 || plan->pid == getpid())) {
    if (plan->skip > 0) {
      plan->skip--;
    } else if (plan->times != 0) {
      hit = 1;
      if (plan->times > 0) plan->times--;
    }
    int length = snprintf(text, sizeof text, "%ld %ld %ld %ld %ld\n", plan->skip, plan->times, plan->code,
                          plan->milliseconds, plan->pid);
    if (ftruncate(file, 0) != 0 || pwrite(file, text, length, 0) != length) abort();
  }
  close(file);
  return hit;
}

static void sleep_for(long milliseconds) {
  struct timespec span = {milliseconds / 1000, milliseconds % 1000 * 1000000};
  nanosleep(&span, NULL);
}

#define AFTER (1L << 40)
#define CRASH (1L << 41)

/* Without the handler of the Rust runtime, which looks for a stack overflow and returns from a signal that is only raised. */
static void crash(void) {
  signal(SIGSEGV, SIG_DFL);
  raise(SIGSEGV);
}

/* What the token shows of itself. The layout of CK_TOKEN_INFO: label 32, manufacturer 32, model 16, serial 16, flags. */
static void edit_info(char *info) {
  static const struct {
    int start, length;
  } texts[] = {{0, 32}, {32, 32}, {64, 16}, {80, 16}};
  char number[32] = {0};
  ulong_t flags;
  int file = open_in_folder("flags", O_RDONLY);
  if (file >= 0) {
    if (read(file, number, sizeof number - 1) > 0) {
      memcpy(&flags, info + 96, sizeof flags);
      flags |= strtoul(number, NULL, 10);
      memcpy(info + 96, &flags, sizeof flags);
    }
    close(file);
  }
  file = open_in_folder("nul", O_RDONLY);
  if (file < 0) return;
  close(file);
  for (int text = 0; text < 4; text++)
    for (int at = texts[text].start + texts[text].length; at-- > texts[text].start && info[at] == ' ';) info[at] = 0;
}

#define FAULTY(name, index, parameters, arguments)                       \
  static ulong_t name parameters {                                       \
    struct plan plan = {0};                                              \
    ulong_t code;                                                        \
    note(#name, "begins", -1);                                           \
    int hit = is_hit(#name, &plan);                                      \
    if (hit) sleep_for(plan.milliseconds);                               \
    if (hit && plan.code == CRASH) crash();                              \
    if (hit && plan.code > 0 && plan.code < AFTER) {                     \
      code = (ulong_t)plan.code;                                         \
    } else {                                                             \
      code = ((ulong_t(*) parameters)real->functions[index])arguments;   \
      if (hit && plan.code >= AFTER && !code) code = (ulong_t)(plan.code - AFTER); \
      if (hit && plan.code == 0) code = 0;                               \
      if (hit && plan.code < -1 && code) code = (ulong_t)-plan.code;     \
    }                                                                    \
    note(#name, "ends", (long)code);                                     \
    return code;                                                         \
  }

static ulong_t (*get_info)(ulong_t, void *);

static ulong_t get_edited_info(ulong_t slot, void *info) {
  ulong_t code = get_info(slot, info);
  if (!code) edit_info(info);
  return code;
}

FAULTY(C_Initialize, 0, (void *arguments), (arguments))
FAULTY(C_InitPIN, 10, (ulong_t session, unsigned char *pin, ulong_t length), (session, pin, length))
FAULTY(C_GenerateKeyPair, 59,
       (ulong_t session, void *mechanism, void *public_template, ulong_t public_count, void *private_template,
        ulong_t private_count, ulong_t *public_key, ulong_t *private_key),
       (session, mechanism, public_template, public_count, private_template, private_count, public_key, private_key))
FAULTY(C_InitToken, 9, (ulong_t slot, unsigned char *pin, ulong_t length, unsigned char *label), (slot, pin, length, label))
FAULTY(C_GetTokenInfo, 6, (ulong_t slot, void *info), (slot, info))
FAULTY(C_OpenSession, 12, (ulong_t slot, ulong_t flags, void *app, void *call, ulong_t *session),
       (slot, flags, app, call, session))
FAULTY(C_Login, 18, (ulong_t session, ulong_t user, unsigned char *pin, ulong_t length), (session, user, pin, length))
FAULTY(C_DecryptInit, 33, (ulong_t session, void *mechanism, ulong_t key), (session, mechanism, key))
FAULTY(C_Decrypt, 34, (ulong_t session, unsigned char *in, ulong_t in_length, unsigned char *out, ulong_t *out_length),
       (session, in, in_length, out, out_length))
FAULTY(C_Sign, 43, (ulong_t session, unsigned char *in, ulong_t in_length, unsigned char *out, ulong_t *out_length),
       (session, in, in_length, out, out_length))
FAULTY(C_Verify, 49, (ulong_t session, unsigned char *in, ulong_t in_length, unsigned char *mac, ulong_t mac_length),
       (session, in, in_length, mac, mac_length))

ulong_t C_GetFunctionList(struct list **list) {
  if (!real) {
    void *module = dlopen(REAL_MODULE, RTLD_NOW | RTLD_LOCAL);
    ulong_t (*get)(struct list **) = module ? (ulong_t(*)(struct list **))dlsym(module, "C_GetFunctionList") : NULL;
    if (!get || get(&real) != 0) return 5;
    static struct list edited;
    edited = *real;
    get_info = (ulong_t(*)(ulong_t, void *))edited.functions[6];
    edited.functions[6] = (void *)get_edited_info;
    real = &edited;
    ours = *real;
    ours.functions[0] = (void *)C_Initialize;
    ours.functions[9] = (void *)C_InitToken;
    ours.functions[10] = (void *)C_InitPIN;
    ours.functions[59] = (void *)C_GenerateKeyPair;
    ours.functions[3] = (void *)C_GetFunctionList;
    ours.functions[6] = (void *)C_GetTokenInfo;
    ours.functions[12] = (void *)C_OpenSession;
    ours.functions[18] = (void *)C_Login;
    ours.functions[33] = (void *)C_DecryptInit;
    ours.functions[34] = (void *)C_Decrypt;
    ours.functions[43] = (void *)C_Sign;
    ours.functions[49] = (void *)C_Verify;
  }
  *list = &ours;
  return 0;
}
