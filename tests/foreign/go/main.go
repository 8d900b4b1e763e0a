// Command foreignclient calls a gRPC method with raw bytes, as grpc-go does it, and tells how each call ended: one JSON
// object a line. The tests decide what that must be.
package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// outcome is what the client knows once a call is over.
type outcome struct {
	Code     string      `json:"code"`
	Message  string      `json:"message"`
	Replies  [][]byte    `json:"replies"` // in base64
	Initial  metadata.MD `json:"initial"`
	Trailers metadata.MD `json:"trailers"`
	Elapsed  float64     `json:"elapsed"` // seconds, retries included
}

// rawCodec passes bytes through, so that no generated code is needed.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(message any) ([]byte, error) { return message.([]byte), nil }

func (rawCodec) Unmarshal(data []byte, message any) error {
	*message.(*[]byte) = append([]byte{}, data...)
	return nil
}

func main() {
	target := flag.String("target", "", "host:port to call")
	method := flag.String("method", "", "/package.Service/Method")
	kind := flag.String("kind", "unary_unary", "what the method is: [unary|stream]_[unary|stream]")
	request := flag.String("request", "", "the one request message, in base64")
	calls := flag.Int("calls", 1, "how many calls, one after the other")
	deadline := flag.Duration("deadline", 10*time.Second, "for each call, retries included")
	config := flag.String("service-config", "{}", "gRPC service config, in JSON")
	sent := metadata.MD{}
	flag.Func("header", "metadata to send, as 'name: value'; may be repeated", func(text string) error {
		name, value, found := strings.Cut(text, ": ")
		if !found {
			return errors.New("not 'name: value'")
		}
		sent.Append(name, value)
		return nil
	})
	flag.Parse()

	message, err := base64.StdEncoding.DecodeString(*request)
	exitOn(err)
	connection, err := grpc.NewClient(
		*target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(*config),
		grpc.WithDisableServiceConfig(), // the resolver's own; ours is the default
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})),
	)
	exitOn(err)
	defer connection.Close()

	from, to, _ := strings.Cut(*kind, "_")
	description := &grpc.StreamDesc{ClientStreams: from == "stream", ServerStreams: to == "stream"}
	out := json.NewEncoder(os.Stdout)
	for range *calls {
		ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(context.Background(), sent), *deadline)
		exitOn(out.Encode(call(ctx, connection, description, *method, message)))
		cancel()
	}
}

// call does what generated stubs do, for all four kinds.
func call(
	ctx context.Context, connection *grpc.ClientConn, kind *grpc.StreamDesc, method string, message []byte,
) outcome {
	begun := time.Now()
	told := outcome{Replies: [][]byte{}}
	stream, err := connection.NewStream(ctx, kind, method)
	if err == nil {
		told.Replies, err = exchange(stream, kind, message)
		told.Initial, _ = stream.Header()
		told.Trailers = stream.Trailer()
	}
	told.Elapsed = time.Since(begun).Seconds()
	told.Code = status.Code(err).String()
	told.Message = status.Convert(err).Message()
	return told
}

func exchange(stream grpc.ClientStream, kind *grpc.StreamDesc, message []byte) ([][]byte, error) {
	replies := [][]byte{}
	// io.EOF says that the call has ended already; receiving tells how.
	if err := stream.SendMsg(message); err != nil && !errors.Is(err, io.EOF) {
		return replies, err
	}
	if err := stream.CloseSend(); err != nil {
		return replies, err
	}
	for {
		var reply []byte
		err := stream.RecvMsg(&reply)
		if errors.Is(err, io.EOF) {
			return replies, nil
		}
		if err != nil {
			return replies, err
		}
		replies = append(replies, reply)
		if !kind.ServerStreams {
			return replies, nil
		}
	}
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}
