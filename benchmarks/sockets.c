/* Sockets for benchmarks, so that neither receivers nor the floor are Python.
 *
 *   sockets receive PORT COUNT SECONDS KEY   opens COUNT websockets, and counts frames and their age until SECONDS of
 *                                            silence have passed. Prints "ready", and then: frames, first and last arrival in
 *                                            s, p50 and p99 of the age in ms.
 *   sockets floor COUNT RATE SECONDS SIZE    sends SIZE bytes to each of COUNT sockets, RATE times a second, in a loop of
 *                                            send(). Prints "floor", and then: sends, seconds, CPU in microseconds a send.
 *
 * The age of a frame is the time since the number behind "t": in it, in nanoseconds of CLOCK_REALTIME.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BUFFER (1 << 18)
#define MAX_AGES (1 << 25)

static double now(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static int by_value(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

struct peer {
  int fd, is_open;
  size_t held;
  unsigned char *bytes;
};

static float *ages;
static long frames;
static double first_at, last_at;

/* Count the whole frames in a peer's buffer, and keep what is left. */
static void count(struct peer *p) {
  size_t at = 0;
  if (!p->is_open) {
    unsigned char *end = memmem(p->bytes, p->held, "\r\n\r\n", 4);
    if (!end) return;
    if (memcmp(p->bytes, "HTTP/1.1 101", 12)) {
      fprintf(stderr, "refused: %.*s\n", (int)p->held, p->bytes);
      exit(1);
    }
    p->is_open = 1;
    at = end + 4 - p->bytes;
  }
  while (p->held - at >= 2) {
    uint64_t size = p->bytes[at + 1] & 127, head = 2;
    if (size == 126) {
      if (p->held - at < 4) break;
      size = p->bytes[at + 2] << 8 | p->bytes[at + 3], head = 4;
    } else if (size == 127) {
      if (p->held - at < 10) break;
      size = 0, head = 10;
      for (int i = 2; i < 10; i++) size = size << 8 | p->bytes[at + i];
    }
    if (p->held - at < head + size) break;
    unsigned char *mark = memmem(p->bytes + at + head, size, "\"t\":", 4);
    if (mark) {
      double wall = now(CLOCK_REALTIME), sent = strtod((char *)mark + 4, NULL) / 1e9;
      last_at = now(CLOCK_MONOTONIC);
      if (!frames) first_at = last_at;
      if (frames < MAX_AGES) ages[frames] = (wall - sent) * 1000;
      frames++;
    }
    at += head + size;
  }
  memmove(p->bytes, p->bytes + at, p->held - at);
  p->held -= at;
}

static int receive(int port, int peers, double silence, const char *key) {
  struct peer *all = calloc(peers, sizeof *all);
  int poll = epoll_create1(0), open = 0;
  ages = malloc(sizeof(float) * MAX_AGES);
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  char request[1024];
  int length = snprintf(request, sizeof request,
                        "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
                        "Authorization: Bearer %s\r\n\r\n", key);
  struct epoll_event events[256];
  for (int next = 0; open < peers;) {
    for (int i = 0; i < 50 && next < peers; i++, next++) {
      struct peer *p = &all[next];
      if ((p->fd = socket(AF_INET, SOCK_STREAM, 0)) < 0) fail("socket");
      if (connect(p->fd, (struct sockaddr *)&to, sizeof to)) fail("connect");
      p->bytes = malloc(BUFFER);
      if (write(p->fd, request, length) != length) fail("write");
      fcntl(p->fd, F_SETFL, O_NONBLOCK);
      struct epoll_event event = {.events = EPOLLIN, .data.ptr = p};
      epoll_ctl(poll, EPOLL_CTL_ADD, p->fd, &event);
    }
    int n = epoll_wait(poll, events, 256, 5000);
    if (!n) { fprintf(stderr, "%d of %d are open\n", open, peers); return 1; }
    for (int i = 0; i < n; i++) {
      struct peer *p = events[i].data.ptr;
      int was = p->is_open;
      ssize_t got = read(p->fd, p->bytes + p->held, BUFFER - p->held);
      if (got <= 0) fail("read");
      p->held += got;
      count(p);
      open += p->is_open - was;
    }
  }
  printf("ready\n");
  fflush(stdout);
  double heard = now(CLOCK_MONOTONIC);
  while (now(CLOCK_MONOTONIC) - heard < silence || !frames) {
    int n = epoll_wait(poll, events, 256, 200);
    long before = frames;
    for (int i = 0; i < n; i++) {
      struct peer *p = events[i].data.ptr;
      ssize_t got = read(p->fd, p->bytes + p->held, BUFFER - p->held);
      if (got == 0 || (got < 0 && errno != EAGAIN)) { fprintf(stderr, "a socket was closed\n"); return 1; }
      if (got > 0) { p->held += got; count(p); }
    }
    if (frames > before) heard = now(CLOCK_MONOTONIC);
    else if (!frames && now(CLOCK_MONOTONIC) - heard > 60) break;
  }
  long kept = frames < MAX_AGES ? frames : MAX_AGES;
  qsort(ages, kept, sizeof *ages, by_value);
  printf("%ld %.3f %.3f %.2f %.2f\n", frames, first_at, last_at, kept ? ages[kept / 2] : 0.0,
         kept ? ages[kept * 99 / 100] : 0.0);
  return 0;
}

static int base(int peers, double rate, double seconds, int size) {
  int *fds = malloc(sizeof(int) * peers);
  char *data = calloc(1, size), sink[1 << 16];
  int child_ends[2];
  int poll = epoll_create1(0);
  int *ends = malloc(sizeof(int) * peers);
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t length = sizeof at;
  if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) fail("listen");
  getsockname(listener, (struct sockaddr *)&at, &length);
  for (int i = 0; i < peers; i++) {
    ends[i] = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(ends[i], (struct sockaddr *)&at, sizeof at)) fail("connect");
    if ((fds[i] = accept(listener, NULL, NULL)) < 0) fail("accept");
    int one = 1;
    setsockopt(fds[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(fds[i], F_SETFL, O_NONBLOCK);
  }
  if (pipe(child_ends)) fail("pipe");
  pid_t reader = fork();
  if (!reader) { /* reads and drops, in a process of its own */
    struct epoll_event events[256];
    for (int i = 0; i < peers; i++) {
      close(fds[i]);
      fcntl(ends[i], F_SETFL, O_NONBLOCK);
      struct epoll_event event = {.events = EPOLLIN, .data.fd = ends[i]};
      epoll_ctl(poll, EPOLL_CTL_ADD, ends[i], &event);
    }
    for (int left = peers; left;) {
      int n = epoll_wait(poll, events, 256, -1);
      for (int i = 0; i < n; i++)
        if (read(events[i].data.fd, sink, sizeof sink) == 0) { close(events[i].data.fd); left--; }
    }
    _exit(0);
  }
  for (int i = 0; i < peers; i++) close(ends[i]);
  struct rusage before, after;
  getrusage(RUSAGE_SELF, &before);
  double begun = now(CLOCK_MONOTONIC);
  long sends = 0, rounds = (long)(rate * seconds);
  for (long round = 0; round < rounds; round++) {
    double wait = begun + round / rate - now(CLOCK_MONOTONIC);
    if (wait > 0) usleep(wait * 1e6);
    for (int i = 0; i < peers; i++)
      if (send(fds[i], data, size, MSG_NOSIGNAL) == size) sends++;
  }
  double lasted = now(CLOCK_MONOTONIC) - begun;
  getrusage(RUSAGE_SELF, &after);
  double cpu = (after.ru_utime.tv_sec - before.ru_utime.tv_sec) + (after.ru_utime.tv_usec - before.ru_utime.tv_usec) / 1e6 +
               (after.ru_stime.tv_sec - before.ru_stime.tv_sec) + (after.ru_stime.tv_usec - before.ru_stime.tv_usec) / 1e6;
  printf("floor\n%ld %.3f %.3f\n", sends, lasted, cpu * 1e6 / sends);
  return 0;
}

int main(int count, char **given) {
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  if (count == 6 && !strcmp(given[1], "receive"))
    return receive(atoi(given[2]), atoi(given[3]), atof(given[4]), given[5]);
  if (count == 6 && !strcmp(given[1], "floor"))
    return base(atoi(given[2]), atof(given[3]), atof(given[4]), atoi(given[5]));
  fprintf(stderr, "usage: sockets receive PORT COUNT SECONDS KEY | floor COUNT RATE SECONDS SIZE\n");
  return 2;
}
